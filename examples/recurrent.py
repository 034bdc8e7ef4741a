"""A language model of characters with a normalized GRU, in an ordinary training loop.

One line differs from what one would write with nn.GRU: the layer. The text is Python's own
documentation of its syntax, which every Python carries.
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamnorm

TEXT = "".join(topics[name] for name in sorted(topics))[:100_000]
SYMBOLS = sorted(set(TEXT))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = streamnorm.NormGRU(len(SYMBOLS), 64)  # was: nn.GRU(len(SYMBOLS), 64)
        self.readout = nn.Linear(64, len(SYMBOLS))

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.gru(F.one_hot(x, len(SYMBOLS)).float())
        return self.readout(output)


def loss_of(model: Model, data: Tensor, at: Tensor, steps: int) -> Tensor:
    x = torch.stack([data[i : i + steps + 1] for i in at.tolist()], 1)
    return F.cross_entropy(model(x[:-1]).flatten(0, 1), x[1:].flatten())


def main(updates: int = 120) -> tuple[float, float]:
    torch.manual_seed(0)
    data = torch.tensor([SYMBOLS.index(symbol) for symbol in TEXT])
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(updates):
        for steps in (20, 30):  # two mini-batches an update, of different lengths
            loss_of(model, data, torch.randint(90_000, (16,)), steps).div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():  # text and a length that were not trained with
        loss = loss_of(model, data, torch.arange(90_001, 99_000, 300), 100).item()
    chance = torch.tensor([TEXT.count(s) / len(TEXT) for s in SYMBOLS]).log().neg()[data].mean().item()
    print(f"nats a character: {loss:.2f}, of the frequencies alone {chance:.2f}")
    return chance, loss


if __name__ == "__main__":
    main()
