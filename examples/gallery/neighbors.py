"""An auto-encoder of sparse text, one docstring at a time: are neighbors by its codes of the same library?"""

import os
from pathlib import Path

import numpy as np
import sklearn.metrics
import torch
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import CountVectorizer
from torch import nn

from streamnorm import StreamingNorm

PICTURE = Path(__file__).parents[2] / "docs/gallery/neighbors.png"
PLACES = {"numpy": np, "torch": nn.functional, "scikit-learn": sklearn.metrics, "python": os}


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    of = {}
    for place, module in enumerate(PLACES.values()):
        names = [getattr(module, name) for name in dir(module) if name[0] != "_"]
        of |= {f.__doc__: place for f in names if callable(f) and len(str(f.__doc__)) > 200}
    words = CountVectorizer(binary=True, stop_words="english", token_pattern="[a-z]{3,}", max_features=400)
    return torch.tensor(words.fit_transform(of).toarray()).float(), torch.tensor(list(of.values()))


def alike(codes: torch.Tensor, place: torch.Tensor) -> float:
    near = nn.functional.normalize(codes) @ nn.functional.normalize(codes).T
    return (place[near.fill_diagonal_(-2).argmax(1)] == place).float().mean().item()


def main(picture: Path = PICTURE, epochs: int = 4) -> dict[str, float]:
    x, place = documents()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    shares = {"words": alike(x, place), "chance": ((place.bincount() / len(place)) ** 2).sum().item()}
    norms = {"StreamingNorm": StreamingNorm(32), "nn.LayerNorm": nn.LayerNorm(32), "no normalization": nn.Identity()}
    for axes, (name, norm) in zip(figure.subplots(1, 3), norms.items(), strict=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(400, 32), norm, nn.ReLU(), nn.Linear(32, 400))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for i in torch.cat([torch.randperm(len(x)) for _ in range(epochs)]).tolist():
            (nn.functional.binary_cross_entropy_with_logits(model(x[i : i + 1]), x[i : i + 1]) * 400).backward()
            optimizer.step()
            optimizer.zero_grad()
        codes = model.eval()[:2](x).detach()
        shares[name] = alike(codes, place)
        a, b = torch.pca_lowrank(codes, 2)[0].T
        for k, label in enumerate(PLACES):
            axes.scatter(a[place == k], b[place == k], 4, label=label)
        axes.set(title=f"{name}: {shares[name]:.0%}", xticks=[], yticks=[])
    axes.legend(fontsize=7)
    figure.savefig(picture, dpi=110)
    print("nearest is of the same library:", ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return shares


if __name__ == "__main__":
    main()
