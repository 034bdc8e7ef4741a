"""A stream whose rule changes in the middle: three networks, a row and a weight update at a time, raw features."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from river.datasets import synth
from torch import nn

from streamnorm import OnlineTrainer, StreamingNorm

PICTURE = Path(__file__).parents[2] / "docs/gallery/drift.png"
NORMS = {"StreamingNorm": StreamingNorm, "nn.LayerNorm": nn.LayerNorm, "no normalization": None}


def rows(seed: int, count: int, change: int) -> tuple[torch.Tensor, torch.Tensor]:
    stream = synth.ConceptDriftStream(
        synth.SEA(variant=0, seed=seed), synth.SEA(variant=3, seed=seed), position=change, width=20, seed=seed
    )
    x, y = zip(*stream.take(count), strict=True)
    return torch.tensor([list(row.values()) for row in x]), torch.tensor(y).long()


def network(norm: type[nn.Module] | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (3, 64):
        layers += [nn.Linear(inputs, 64, bias=norm is None), *([] if norm is None else [norm(64)]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 2))


def main(picture: Path = PICTURE, seeds: int = 3, count: int = 4000) -> dict[str, float]:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    accuracy = {}
    for name, norm in NORMS.items():
        right = torch.zeros(count)
        for seed in range(seeds):
            torch.manual_seed(seed)
            x, y = rows(seed, count, count // 2)
            model = network(norm)
            trainer = OnlineTrainer(model, torch.optim.Adam(model.parameters(), lr=0.003))
            _, outputs = trainer.steps(x, y)  # each from before its row was learned
            right += (outputs.argmax(1) == y) / seeds
        accuracy[name] = right.mean().item()
        curve = right.unfold(0, 200, 20).mean(1)
        axes.plot(range(200, count + 1, 20), 100 * curve, label=f"{name}: {accuracy[name]:.1%}")
    axes.axvline(count // 2, color="gray", linestyle=":")
    axes.set(xlabel="row; at the dotted line the rule changes", ylabel="% right, of the last 200")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    print("right before it was learned:", ", ".join(f"{name} {share:.1%}" for name, share in accuracy.items()))
    return accuracy


if __name__ == "__main__":
    main()
