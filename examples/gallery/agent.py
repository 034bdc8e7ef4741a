"""An agent that sees a digit, names it, and is told only whether it was right: a policy learned by its reward, online.

Pixels are raw, from 0 to 16, and each decision is one weight update.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from streamnorm import StreamingNorm

PICTURE = Path(__file__).parents[2] / "docs/gallery/agent.png"
NORMS = {"StreamingNorm": StreamingNorm, "nn.LayerNorm": nn.LayerNorm, "no normalization": nn.Identity}


def rewards(norm: type[nn.Module], seed: int, decisions: int) -> torch.Tensor:
    torch.manual_seed(seed)
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    model = nn.Sequential(nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    got = torch.zeros(decisions)
    for i, seen in enumerate(torch.randint(len(x), (decisions,)).tolist()):
        chances = model(x[seen : seen + 1].float()).log_softmax(1)[0]
        action = torch.multinomial(chances.detach().exp(), 1).item()
        got[i] = action == y[seen]
        baseline = got[max(0, i - 100) : i + 1].mean()
        (-(got[i] - baseline) * chances[action]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return got


def main(picture: Path = PICTURE, seeds: int = 2, decisions: int = 3000) -> dict[str, float]:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    last = {}
    for name, norm in NORMS.items():
        got = torch.stack([rewards(norm, seed, decisions) for seed in range(seeds)]).mean(0)
        last[name] = got[-decisions // 8 :].mean().item()
        axes.plot(
            range(200, decisions + 1, 20), 100 * got.unfold(0, 200, 20).mean(1), label=f"{name}: {last[name]:.0%}"
        )
    axes.set(xlabel="decision", ylabel="% right, of the last 200")
    axes.legend(title="in the last eighth")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    print("right in the last eighth:", ", ".join(f"{name} {share:.0%}" for name, share in last.items()))
    return last


if __name__ == "__main__":
    main()
