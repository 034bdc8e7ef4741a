"""A language model of characters, from Python's own documentation: a GRU with and without normalization inside."""

from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from torch import nn

from streamnorm import NormGRU, SampleNorm

PICTURE = Path(__file__).parents[2] / "docs/gallery/text.png"
TEXT = "".join(topics[name] for name in sorted(topics))[:100_000]
SYMBOLS = sorted(set(TEXT))
GRUS = {"NormGRU": NormGRU, "NormGRU(norm=SampleNorm)": partial(NormGRU, norm=SampleNorm), "nn.GRU": nn.GRU}


class Model(nn.Module):
    def __init__(self, gru: partial | type[nn.Module]) -> None:
        super().__init__()
        self.gru, self.readout = gru(len(SYMBOLS), 64), nn.Linear(64, len(SYMBOLS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.gru(nn.functional.one_hot(x, len(SYMBOLS)).float())[0])


def loss_of(model: Model, data: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    x = torch.stack([data[i : i + 26] for i in at.tolist()], 1)
    return nn.functional.cross_entropy(model(x[:-1]).flatten(0, 1), x[1:].flatten())


def main(picture: Path = PICTURE, updates: int = 120) -> dict[str, float]:
    data = torch.tensor([SYMBOLS.index(symbol) for symbol in TEXT])
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    tested = {}
    for name, gru in GRUS.items():
        torch.manual_seed(0)
        model = Model(gru)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for _ in range(updates):
            optimizer.zero_grad()
            loss = loss_of(model, data, torch.randint(90_000, (16,)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        tested[name] = loss_of(model.eval(), data, torch.arange(90_001, 99_000, 100)).item()
        axes.plot(range(1, updates + 1), losses, label=f"{name}: {tested[name]:.2f} on other text", linewidth=1)
    axes.set(xlabel="weight update", ylabel="nats a character")
    axes.legend()
    figure.savefig(picture, dpi=110)
    print("nats a character of other text:", ", ".join(f"{name} {loss:.2f}" for name, loss in tested.items()))
    return tested


if __name__ == "__main__":
    main()
