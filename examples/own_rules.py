"""An F and a G of your own: here plain exponential averages that are renewed at every arrival, folding or not.

Theirs is all there is to write: what is remembered, and what one arrival does to it. Guarding against what is not
finite, vectorized cycles, checkpoints and half precision come with the layer.
"""

import torch
from torch import nn

from streamnorm import BA1, Lp, Norm, Policy, Rule, attach


class Average(Rule):
    def __init__(self, keep: float) -> None:
        self.keep = keep

    def empty(self, shape):
        return {"average": torch.zeros(*shape), "count": torch.zeros((), dtype=torch.int64)}

    def step(self, state, s):
        average = torch.where(state["count"] > 0, self.keep * state["average"] + (1 - self.keep) * s, s)
        return {"average": average, "count": state["count"] + 1}, average


class Averages(Policy):
    F, G, uses_estimate = Average(0.9), Average(0.5), True


def main(steps: int = 200) -> tuple[float, float]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32, bias=False),
        Norm(32, BA1, Lp(2, "estimate"), Averages(), affine=True),
        nn.ReLU(),
        nn.Linear(32, 1),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    attach(model, optimizer)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 8)
        loss = (model(x) - x[:, :4].abs().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
    print(f"own F and G: loss {first:.2f} at first, {last:.2f} at last")
    return first, last


if __name__ == "__main__":
    main()
