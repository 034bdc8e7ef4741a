"""A network trained one digit at a time, exported to ONNX and run without torch, as it is and folded."""

import io
from pathlib import Path

import onnx
import torch
from matplotlib.figure import Figure
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from torch import nn

from streamnorm import OnlineTrainer, StreamingNorm, fold_into

PICTURE = Path(__file__).parents[2] / "docs/gallery/onnx_export.png"


def main(picture: Path = PICTURE) -> tuple[float, list[str]]:
    torch.manual_seed(0)
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 32, bias=False), StreamingNorm(32), nn.ReLU(), nn.Linear(32, 10))
    OnlineTrainer(model, torch.optim.SGD(model.parameters(), lr=0.02)).steps(x[:1437], y[:1437])
    model.eval()
    figure = Figure(figsize=(7, 3), layout="constrained")
    furthest, nodes = 0.0, []
    for axes, title in zip(figure.subplots(1, 2), ("as it is", "folded"), strict=True):
        if title != "as it is":
            fold_into(model)
        n = torch.export.Dim("n", min=2, max=1000)
        file = io.BytesIO()
        made = torch.onnx.export(model, (x[:3],), dynamo=True, dynamic_shapes=({0: n},), verbose=False)
        made.save(file)
        loaded = onnx.load_from_string(file.getvalue())
        nodes.append([node.op_type for node in loaded.graph.node])
        theirs = torch.tensor(ReferenceEvaluator(loaded).run(None, {loaded.graph.input[0].name: x[1437:].numpy()})[0])
        ours = model(x[1437:]).detach()
        furthest = max(furthest, (theirs - ours).abs().max().item())
        axes.plot(ours.flatten(), theirs.flatten(), ".", markersize=2)
        axes.set(title=f"{title}: {len(nodes[-1])} operations", xlabel="output in torch", ylabel="output in ONNX")
    figure.savefig(picture, dpi=110)
    print(f"ONNX and torch differ by at most {furthest:.1g}; operations: {len(nodes[0])}, folded {len(nodes[1])}")
    return furthest, nodes[1]


if __name__ == "__main__":
    main()
