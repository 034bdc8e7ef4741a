"""Averages of weights come with statistics of other weights, until they are recalibrated: how far off, in sigmas."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel

from streamnorm import StreamingNorm, recalibrate
from streamnorm.calibration import gap

PICTURE = Path(__file__).parents[2] / "docs/gallery/averaging.png"
NORMS = {"StreamingNorm": StreamingNorm, "nn.BatchNorm2d": nn.BatchNorm2d}
CASES, YLABELS = ("last", "averaged", "recalibrated"), ("test error, %", "largest distance, sigmas")


def measured(norm: type[nn.Module], seed: int, epochs: int) -> list[list[float]]:
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    averaged = AveragedModel(model)  # its statistics are those of the last weights
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
        wrong = (net.eval()(x[1437:]).argmax(1) != y[1437:]).float().mean().item()
        found.append([100 * wrong, gap(net, x[:1437].split(64)).largest])
    return found


def main(picture: Path = PICTURE, seeds: int = 3, epochs: int = 4) -> dict[str, list[list[float]]]:
    figure, means = Figure(figsize=(8, 3), layout="constrained"), {}
    both = figure.subplots(1, 2)
    for i, (name, norm) in enumerate(NORMS.items()):
        every = torch.tensor([measured(norm, seed, epochs) for seed in range(seeds)])
        means[name] = every.mean(0).tolist()
        for axes, mean, sd, label in zip(both, every.mean(0).T, every.std(0).T, YLABELS, strict=True):
            axes.bar(torch.arange(3) + 0.4 * i, mean, 0.38, yerr=sd, capsize=3, label=name)
            axes.set_xticks([0.2, 1.2, 2.2], labels=CASES)
            axes.set(ylabel=label)
    both[1].legend()
    figure.savefig(picture, dpi=110)
    for name, cases in means.items():
        print(name, ", ".join(f"{c} {e:.1f} % {d:.3f}" for c, (e, d) in zip(CASES, cases, strict=True)))
    return means


if __name__ == "__main__":
    main()
