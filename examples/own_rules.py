"""An F and a G of your own: exponential averages that are renewed at every arrival, folding or not.

Theirs is all there is to write: what is remembered, and what one arrival does to it. Guarding against what is not
finite, vectorized cycles, checkpoints and half precision come with the layer.
"""

import torch
from torch import nn

from streamnorm import BA1, GradientRule, Lp, Norm, Policy, Rule


class Average(Rule):  # it begins with mean 0 and deviation 1, not with the first arrival
    def empty(self, shape):
        return {"average": torch.stack([torch.zeros(shape[1:]), torch.ones(shape[1:])])}

    def step(self, state, s):
        average = 0.9 * state["average"] + 0.1 * s
        return {"average": average}, average


class InUnitsOfY(GradientRule):  # of dE/dy and of dE/dy y: they do not grow when x shrinks
    def empty(self, shape):
        return {"average": torch.zeros(*shape)}

    def step(self, state, g, s, s_hat):
        average = 0.5 * state["average"] + 0.5 * g * s_hat[1]
        return {"average": average}, torch.stack([average[0], average[1] * s[1] / s_hat[1]]) / s_hat[1]


class Averages(Policy):
    F, G, uses_estimate = Average(), InUnitsOfY(), True


def main(steps: int = 200) -> tuple[float, float]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32, bias=False),
        Norm(32, BA1, Lp(2, "estimate"), Averages(), affine=True),
        nn.ReLU(),
        nn.Linear(32, 1),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
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
