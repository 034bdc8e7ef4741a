"""A pretrained network meets other images, two at a time: with its batch normalization, converted, and frozen."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from streamnorm import convert, freeze

PICTURE = Path(__file__).parents[2] / "docs/gallery/pretrained.png"
WAYS = {"nn.BatchNorm2d": nn.Module.train, "convert": convert, "convert, freeze": lambda model: freeze(convert(model))}


def learn(model: nn.Module, x: Tensor, y: Tensor, batch: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=lr)
    for index in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        optimizer.zero_grad()


def course(way: str, seed: int, parts: int) -> list[float]:
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    for _ in range(3):
        learn(model, x[:1000], y[:1000], batch=32, lr=0.1)  # stands for the training of somebody else
    other = 1 - x  # white paper in the place of black
    model = WAYS[way](model)
    errors = []
    for part in (torch.arange(0), *torch.arange(1000, 1437).split(437 // parts)[:parts]):
        learn(model, other[part], y[part], batch=2, lr=0.02)
        errors.append(100 * (model.eval()(other[1437:]).argmax(1) != y[1437:]).float().mean().item())
    return errors


def main(picture: Path = PICTURE, seeds: int = 3, parts: int = 6) -> dict[str, float]:
    axes, last = (figure := Figure(figsize=(7, 3.2), layout="constrained")).subplots(), {}
    for way in WAYS:
        errors = torch.tensor([course(way, seed, parts) for seed in range(seeds)])
        last[way] = errors[:, -1].mean().item()
        x, label = [part * (437 // parts) for part in range(parts + 1)], f"{way}: {last[way]:.1f}"
        axes.errorbar(x, errors.mean(0).tolist(), errors.std(0).tolist(), marker="o", capsize=3, label=label)
    axes.set(xlabel="images of the other kind, two a batch", ylabel="test error, %")
    axes.legend()
    figure.savefig(picture, dpi=110)
    print("test error at last:", ", ".join(f"{way} {error:.1f} %" for way, error in last.items()))
    return last


if __name__ == "__main__":
    main()
