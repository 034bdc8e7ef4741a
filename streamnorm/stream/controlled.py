"""The rules of Online Normalization (Chiley et al. 2019, arXiv 1905.05894). Imports the rule.

F normalizes with its state from before an arrival; G is a controller that drives two accumulated errors to 0.

Legend: ``g`` arrivals in order along the first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamnorm.stream.rule import CHUNK, GradientRule, Rule, State, affine_scan, column, in_chunks, taken_in


@dataclass(frozen=True)
class Lagging(Rule):
    """F: exponential averages of mean and variance up to the previous arrival, starting from mean 0 and variance 1.

    ::

        estimate    (mu_{t-1}, sqrt(var_{t-1}))
        arrival     var <- alpha var + (1 - alpha) var(x) + alpha (1 - alpha) (mean(x) - mu)^2
                    mu  <- alpha mu + (1 - alpha) mean(x)

    It is for ``Lp(2, "estimate")``: there ``sigma^2 = var(x) + (mean(x) - mu_{t-1})^2 + eps``, so that eps is in the
    variance. Testing normalizes with the latest averages. Weight updates have no effect.

    Args:
        alpha: decay of the averages per arrival.
    """

    collects = ("moments",)
    alpha: float = 0.999

    def __post_init__(self) -> None:
        expect_decay("alpha", self.alpha)

    def empty(self, shape: Sequence[int]) -> State:
        return {"moments": torch.stack([torch.zeros(*shape[1:]), torch.ones(*shape[1:])])}

    def step(self, state: State, s: Tensor) -> tuple[State, Tensor]:
        new, estimate = self.observe(state, s.unsqueeze(0))
        return new, estimate[0]

    def observe(self, state: State, s: Tensor, ok: Tensor | None = None) -> tuple[State, Tensor]:
        if len(s) > CHUNK:
            return in_chunks(self, state, s, ok)
        mu, var = state["moments"].to(s.dtype).split([1, len(state["moments"]) - 1])
        fits = s[:, 1:].square().isfinite().flatten(1).all(1)  # a non-finite variance would stay forever
        ok = fits if ok is None else ok & fits
        means, mu = self._averages(mu, s[:, :1], ok)
        squares, var = self._averages(var, s[:, 1:].square() - (1 - self.alpha) * (s[:, :1] - means).square(), ok)
        return {"moments": torch.cat([mu, var])}, torch.cat([means, squares.sqrt()], 1)

    def _averages(self, old: Tensor, values: Tensor, ok: Tensor | None) -> tuple[Tensor, Tensor]:
        """The average before each of the arrivals ``values (g, ...)``, and the one after all of them."""
        ok = torch.ones(len(values), dtype=torch.bool, device=values.device) if ok is None else ok
        # after_j = alpha^{k_j} old + (1 - alpha) sum_{i<=j} alpha^{k_j - k_i} values_i, k_j arrivals up to there. The
        # weights add up to 1: what differs from old is summed.
        k = ok.cumsum(0).to(values.dtype)
        weight = (1 - self.alpha) * (self.alpha ** (k[:, None] - k[None, :]).clamp_min(0)).tril() * ok
        after = taken_in(old, weight, torch.where(column(ok, values), values - old, 0))
        return torch.cat([old.unsqueeze(0), after[:-1]]), after[-1]

    def settled(self, state: State) -> Tensor:
        return self.for_testing(state, state["moments"])

    def for_testing(self, state: State, latest: Tensor) -> Tensor:
        mu, var = state["moments"]
        return torch.stack([mu, var.sqrt()])

    def merge(self, states: Sequence[State]) -> State:
        """The mean of the averages."""
        return {"moments": torch.stack([state["moments"] for state in states]).mean(0)}


@dataclass(frozen=True)
class Controlled(GradientRule):
    """G: in the long run the gradient that is passed on has mean 0 and no correlation with y.

    ::

        y' = dy - (1 - alpha) e_y y                    e_y <- e_y + mean(y' y)
        dx = y' / sigma_hat - (1 - alpha) e_1          e_1 <- e_1 + mean(dx)

    with means over the arrival; the errors are kept as sums, as the gradients of s_hat are sums. An arrival with
    ``mean(y^2) > 2 / (1 - alpha)`` makes e_y overshoot, which is why outputs are clamped or scaled afterwards.

    Args:
        alpha: ``1 - alpha`` is the share of the accumulated errors that is subtracted.
    """

    collects = ("errors",)
    alpha: float = 0.99

    def __post_init__(self) -> None:
        expect_decay("alpha", self.alpha)

    def empty(self, shape: Sequence[int]) -> State:
        return {"errors": torch.zeros(*shape)}

    def step(self, state: State, g: Tensor, s: Tensor, s_hat: Tensor) -> tuple[State, Tensor]:
        new, estimate = self.observe(state, g.unsqueeze(0), s.unsqueeze(0), s_hat.unsqueeze(0))
        return new, estimate[0]

    def observe(
        self, state: State, g: Tensor, s: Tensor, s_hat: Tensor, ok: Tensor | None = None
    ) -> tuple[State, Tensor]:
        rate, old = 1 - self.alpha, state["errors"].to(g.dtype)
        (mu, sigma), (mu_hat, sigma_hat) = s.to(g.dtype).unbind(1), s_hat.to(g.dtype).unbind(1)
        mean, square = (mu - mu_hat) / sigma_hat, (sigma / sigma_hat).square()
        # The errors (e_1, e_y) as an affine function of the previous ones.
        P = torch.stack(
            [
                torch.full_like(mean, self.alpha),
                -rate * mean / sigma_hat,
                torch.zeros_like(mean),
                1 - rate * square,
            ]
        )
        q = torch.stack([-g[:, 0], -g[:, 1] * sigma_hat])
        if ok is not None:
            stays = torch.tensor([1.0, 0.0, 0.0, 1.0], device=g.device, dtype=g.dtype)
            P = torch.where(column(ok, mean), P, stays.reshape(4, *[1] * mean.ndim))
            q = torch.where(column(ok, mean), q, 0)
        after = affine_scan(P, q, old)
        e_1, e_y = torch.cat([old.unsqueeze(1), after[:, :-1]], 1)
        return {"errors": after[:, -1]}, -rate * torch.stack([e_1, e_y * sigma / sigma_hat.square()], 1)

    def merge(self, states: Sequence[State]) -> State:
        """The mean of the errors."""
        return {"errors": torch.stack([state["errors"] for state in states]).mean(0)}


def expect_decay(name: str, value: object) -> None:
    """Raise unless it is a number between 0 and 1."""
    if not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(f"{name} is a decay, in (0, 1), got {value!r}")
