"""Weights that are averaged over training have no statistics of their own, until they are recalibrated."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel

from streamnorm import StreamingNorm, recalibrate

PICTURE = Path(__file__).parents[2] / "docs/gallery/averaging.png"
NORMS = {"StreamingNorm": StreamingNorm, "nn.BatchNorm2d": nn.BatchNorm2d}
CASES = ("last weights", "averaged weights", "averaged, recalibrated")


def errors(norm: type[nn.Module], seed: int, epochs: int) -> list[float]:
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    averaged = AveragedModel(model)  # of weights; statistics are those of its first model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for index in torch.randperm(1437)[:1424].split(16):
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
        averaged.update_parameters(model)
    found = []
    for net in (model, averaged, averaged):
        if len(found) == 2:
            recalibrate(averaged, x[:1437].split(64))
        found.append(100 * (net.eval()(x[1437:]).argmax(1) != y[1437:]).float().mean().item())
    return found


def main(picture: Path = PICTURE, seeds: int = 3, epochs: int = 4) -> dict[str, list[float]]:
    axes, means = (figure := Figure(figsize=(6.5, 3), layout="constrained")).subplots(), {}
    for i, (name, norm) in enumerate(NORMS.items()):
        every = torch.tensor([errors(norm, seed, epochs) for seed in range(seeds)])
        means[name] = every.mean(0).tolist()
        bars = axes.bar([c + 0.4 * i for c in range(3)], means[name], 0.38, yerr=every.std(0), capsize=3, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks([c + 0.2 for c in range(3)], labels=CASES)
    axes.set(yscale="log", ylabel="test error, %")
    axes.legend()
    figure.savefig(picture, dpi=110)
    print("test error:", "; ".join(f"{n} " + ", ".join(f"{e:.1f}" for e in m) for n, m in means.items()))
    return means


if __name__ == "__main__":
    main()
