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
    averaged, optimizer = AveragedModel(model), torch.optim.SGD(model.parameters(), lr=0.1)
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
    both, means = (figure := Figure(figsize=(8, 3), layout="constrained")).subplots(1, 2), {}
    for i, (name, norm) in enumerate(NORMS.items()):
        every = torch.tensor([measured(norm, seed, epochs) for seed in range(seeds)])
        means[name] = every.mean(0).tolist()
        for axes, mean, sd, label in zip(both, every.mean(0).T.numpy(), every.std(0).T.numpy(), YLABELS, strict=True):
            axes.bar([0.4 * i, 1 + 0.4 * i, 2 + 0.4 * i], mean, 0.38, yerr=sd, capsize=3, label=name)
            axes.set(xticks=[0.2, 1.2, 2.2], xticklabels=CASES, ylabel=label)
    both[1].legend(loc="center right")
    figure.savefig(picture, dpi=110)
    print("error, distance:", {n: [f"{e:.1f} %, {d:.2g}" for e, d in m] for n, m in means.items()})
    return means


if __name__ == "__main__":
    main()
