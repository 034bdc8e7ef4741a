"""Gradient accumulation: 32 digits a weight update, in mini-batches of 2 to 32. Only the mini-batch differs."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from streamnorm import StreamingNorm

PICTURE = Path(__file__).parents[2] / "docs/gallery/accumulation.png"
NORMS = {"StreamingNorm": StreamingNorm, "nn.BatchNorm1d": nn.BatchNorm1d, "nn.LayerNorm": nn.LayerNorm}
BATCHES, AN_UPDATE = (2, 4, 8, 16, 32), 32


def error(norm: type[nn.Module], batch: int, seed: int, epochs: int) -> float:
    torch.manual_seed(seed)
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 64, bias=False), norm(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for update in torch.randperm(1437)[: 1437 // AN_UPDATE * AN_UPDATE].split(AN_UPDATE):
            for part in update.split(batch):
                loss = nn.functional.cross_entropy(model(x[part]), y[part])
                (loss * batch / AN_UPDATE).backward()
            optimizer.step()
            optimizer.zero_grad()
    return 100 * (model.eval()(x[1437:]).argmax(1) != y[1437:]).float().mean().item()


def main(picture: Path = PICTURE, seeds: int = 3, epochs: int = 1) -> dict[str, list[float]]:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    means = {}
    for name, norm in NORMS.items():
        errors = torch.tensor([[error(norm, batch, seed, epochs) for batch in BATCHES] for seed in range(seeds)])
        means[name] = errors.mean(0).tolist()
        axes.errorbar(BATCHES, means[name], errors.std(0).tolist(), marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="digits a mini-batch, 32 a weight update", ylabel="test error, %")
    axes.set_xticks(BATCHES, labels=map(str, BATCHES))
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    print("test error at 2 and 32:", ", ".join(f"{name} {m[0]:.1f} and {m[-1]:.1f} %" for name, m in means.items()))
    return means


if __name__ == "__main__":
    main()
