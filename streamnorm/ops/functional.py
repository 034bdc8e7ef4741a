"""The op: forward and backward pass of a normalization (Algorithms 1 to 6).

::

    forward    x  --reduce--> s        --F(H1)--> s_hat --map--> y
    backward   dy --reduce--> dE/ds_hat --G(H2)--> g_hat --map--> dx

It combines kernels and stream, independent of modules. The gradient is straight-through: g_hat takes the place of
dE/ds, whatever the share of s in the estimate s_hat (Algorithm 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from streamnorm.definition.layer import Definition, Statistics
from streamnorm.definition.ref import NormRef, mean_over
from streamnorm.ops import eager, generic
from streamnorm.ops.across import Across
from streamnorm.ops.backends import Backend, choose, may_use, using
from streamnorm.stream import Memory, finite
from streamnorm.tracing import is_traced


def _full(samples: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Streams:
    """What one call needs of the stream.

    Attributes:
        H1, H2: the memories of F and G, or None if the policy has none.
        uses_estimate: normalize with s_hat (Algorithm 5), not with s (Algorithms 1, 3).
        recall: s and the estimates, each ``(g, 2, ...)``, of the call that is recomputed (activation checkpointing), so
            that nothing is observed twice; None for a first call.
        is_reversed: in the backward pass the g steps arrive at G last to first, as through time.
        unit: gradients are multiplied by it before G, and G's estimate divided by it: the number of steps if the loss
            is their mean and not their sum.
        trust: factor on the gradients of gain and bias, of the number of samples in each step.
        across: the processes whose batches are taken together; None: this one alone.
    """

    H1: Memory | None
    H2: Memory | None
    uses_estimate: bool
    recall: tuple[Tensor, Tensor] | None = None
    is_reversed: bool = False
    unit: float = 1
    trust: Callable[[int], float] = _full
    across: Across | None = None


def pack(mu: Tensor, sigma: Tensor, ref: NormRef) -> Tensor:
    """Statistics as a memory takes them: ``(g, 2, G q', *place')``, row 0 the mean, row 1 sigma."""
    return torch.stack([pack_row(mu, ref), pack_row(sigma, ref)], 1)


def pack_row(stat: Tensor, ref: NormRef) -> Tensor:
    """One statistic ``(g, m', G, q', *place') -> (g, G q', *place')``: the mean over the samples, and no place axes
    where the reference covers all places."""
    row = (stat.squeeze(1) if stat.shape[1] == 1 else mean_over(stat, (1,)).squeeze(1)).flatten(1, 2)
    return row.flatten(1) if ref.place == "all" else row


def unpack_row(row: Tensor, like: Tensor) -> Tensor:
    """``(g, G q', *place')`` shaped as the statistic ``like (g, m', G, q', *place')``, with m' = 1."""
    return row.to(like.dtype).reshape(like.shape[0], 1, *like.shape[2:])


_latest = ContextVar("_latest", default=False)


@contextmanager
def latest_statistics() -> Iterator[None]:
    """The backward pass of calls inside differentiates N with H1's latest estimate at that time, not with the one that
    the forward pass used: the caveat of section 4.3. S is differentiated as usual. Not supported by the kernels, so
    torch operations are used."""
    token = _latest.set(True)
    try:
        with using("eager" if may_use("eager") else "generic"):
            yield
    finally:
        _latest.reset(token)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, shift: Tensor | None, d: Definition, streams: Streams
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        kernel = streams.across or choose(d, x)
        data = x.to(torch.promote_types(x.dtype, torch.float32))
        mu = kernel.mean(data, d)
        samples = streams.across.samples if streams.across else data.shape[1]
        ok = center = estimate = s = None
        if getattr(d.moment, "center", None) == "estimate":
            center, sigma, ok = _about_the_estimate(kernel, data, mu, d, streams, samples)
        else:
            sigma = kernel.sigma(data, d, mu, None)
        if streams.H1 is not None:
            s = pack(mu, sigma, d.ref)
            ok = finite(s, ok)
            if streams.H2 is not None:
                streams.H2.fit(s)
            estimate = streams.H1.take(s, ok, samples) if streams.recall is None else _recalled(s, streams.recall)
        mu_hat, sigma_hat = mu, sigma
        if streams.uses_estimate:
            assert estimate is not None
            mu_hat, sigma_hat = unpack_row(estimate[:, 0], mu), unpack_row(estimate[:, 1], sigma)
        ctx.kernel, ctx.definition, ctx.streams, ctx.ok, ctx.samples = kernel, d, streams, ok, samples
        ctx.latest = streams.H1 if streams.uses_estimate and not is_traced() and _latest.get() else None
        ctx.save_for_backward(x, gain, mu, sigma, center, mu_hat, sigma_hat)
        joined = {} if gain is None else {"gain": gain.to(mu.dtype), "shift": shift.to(mu.dtype)}  # type: ignore[union-attr]
        y = kernel.apply(data, d, mu_hat, sigma_hat, **joined).to(x.dtype)
        if estimate is not None:
            ctx.mark_non_differentiable(estimate, s)
        return y, estimate, s

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dy: Tensor = grads[0]
        if torch.is_grad_enabled():
            return second_derivative(ctx.saved_tensors[0], dy, ctx.definition, ctx.streams.H1), None, None, None, None
        kernel, d, streams = ctx.kernel, ctx.definition, ctx.streams
        x, gain, mu, sigma, center, mu_hat, sigma_hat = ctx.saved_tensors
        data, grad = x.to(mu.dtype), dy.to(mu.dtype)
        g_mu, g_sigma = kernel.stat_grads(grad, data, d, mu_hat, sigma_hat)
        dgain = dshift = None
        joined = {}
        if gain is not None:
            # Each statistic belongs to one feature: its gradients contain the sums for gain and bias.
            dgain, dshift = (
                -streams.trust(ctx.samples) * (g * sigma_hat).flatten().to(gain.dtype) for g in (g_sigma, g_mu)
            )
        if ctx.latest is not None:
            now = ctx.latest.estimate.expand(len(data), *ctx.latest.estimate.shape)
            mu_hat, sigma_hat = unpack_row(now[:, 0], mu_hat), unpack_row(now[:, 1], sigma_hat)
            g_mu, g_sigma = kernel.stat_grads(grad, data, d, mu_hat, sigma_hat)
        if gain is not None:
            joined["gain"] = gain.to(mu.dtype)
            g_mu, g_sigma = (g * joined["gain"].reshape(g.shape) for g in (g_mu, g_sigma))
        if not ctx.needs_input_grad[0]:
            return None, dgain, dshift, None, None
        unit = streams.unit
        if streams.across is not None:
            g_mu, g_sigma = (g.to(mu.dtype) for g in streams.across.sum(g_mu, g_sigma))
            unit = unit / streams.across.size  # the loss of all is the mean of theirs
        if streams.H2 is not None:
            g = pack(g_mu, g_sigma, d.ref) * unit
            call = pack(mu, sigma, d.ref), pack(mu_hat, sigma_hat, d.ref)
            g_hat = observe_back(streams.H2, g, ctx.ok, streams.is_reversed, ctx.samples, call) / unit
            g_mu, g_sigma = unpack_row(g_hat[:, 0], g_mu), unpack_row(g_hat[:, 1], g_sigma)
        # Where F took the mean over the m' samples of s, each sample's own s has the weight 1 / m' in it.
        share = mu.shape[1] // g_mu.shape[1]
        if share > 1:
            g_mu, g_sigma = g_mu / share, g_sigma / share
        s = Statistics(mu, sigma, center, mu_hat, sigma_hat)
        return kernel.input_grad(grad, data, d, s, g_mu, g_sigma, **joined).to(x.dtype), dgain, dshift, None, None


class _Estimate(torch.autograd.Function):
    """``s (g, 2, ...) -> s_hat`` by F; its backward pass ``dE/ds_hat -> g_hat`` is G, not F's true gradient."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, ok: Tensor | None, samples: int, streams: Streams) -> Tensor:
        assert streams.H1 is not None
        ok = finite(s, ok)
        estimate = streams.H1.take(s, ok, samples)
        ctx.samples, ctx.streams = samples, streams
        ctx.save_for_backward(s, estimate, ok)
        return estimate

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        streams, (s, estimate, ok) = ctx.streams, ctx.saved_tensors
        if streams.H2 is None:
            return grads[0], None, None, None
        g = grads[0] * streams.unit
        g_hat = observe_back(streams.H2, g, ok, streams.is_reversed, ctx.samples, (s, estimate))
        return g_hat / streams.unit, None, None, None


def normalize_traced(x: Tensor, definition: Definition, streams: Streams) -> Tensor:
    """``normalize`` for ``torch.compile``: plain torch operations around ``_Estimate``, which the compiler
    differentiates and fuses. Without gain and bias."""
    d, samples = definition, x.shape[1]
    data = x.to(torch.promote_types(x.dtype, torch.float32))
    mu, ok, center = generic.mean(data, d), None, None
    if getattr(d.moment, "center", None) == "estimate":
        with torch.no_grad():
            center, _, ok = _about_the_estimate(generic, data, mu, d, streams, samples)
    sigma = generic.sigma(data, d, mu, center)
    if streams.uses_estimate:
        s = pack(mu, sigma, d.ref)
        for memory in (streams.H1, streams.H2):
            if memory is not None:
                memory.fit(s)  # a compiler cannot create buffers inside a Function
        s_hat = _Estimate.apply(s, ok, samples, streams)
        mu, sigma = unpack_row(s_hat[:, 0], mu), unpack_row(s_hat[:, 1], sigma)
    elif streams.H1 is not None:
        s = pack(mu.detach(), sigma.detach(), d.ref)
        streams.H1.take(s, finite(s, ok), samples)
    return generic.apply(data, d, mu, sigma).to(x.dtype)


def observe_back(
    H2: Memory, g: Tensor, ok: Tensor | None, is_reversed: bool, samples: int, call: tuple[Tensor, Tensor]
) -> Tensor:
    """G's estimates for the gradients ``g (g, 2, ...)`` of the steps, which arrive in order or last to first.

    Args:
        samples: number of samples in each step.
        call: the steps' s and s_hat ``(g, 2, ...)``.
    """
    ok = finite(g, ok)
    if not is_reversed or len(g) == 1:
        return H2.take(g, ok, samples, call)
    s, s_hat = call
    return H2.take(g.flip(0), None if ok is None else ok.flip(0), samples, (s.flip(0), s_hat.flip(0))).flip(0)


def refuse_second_derivative() -> None:
    """Raise if the running backward pass is itself recorded for differentiation (``create_graph=True``)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradient of a streamnorm layer that remembers cannot be differentiated again; call backward without "
            "create_graph=True, or leave the normalized part out of the penalty on the gradient"
        )


def second_derivative(x: Tensor, dy: Tensor, d: Definition, H1: Memory | None) -> Tensor:
    """``dx`` for a canonical ``x``, as a differentiable function of x and dy.

    Raises:
        RuntimeError: with a memory, where the gradient is not a true derivative.
    """
    if H1 is not None:
        refuse_second_derivative()
    with torch.enable_grad():
        return torch.autograd.grad(normalize_alone(x, d), x, dy, create_graph=True)[0]


def _about_the_estimate(
    kernel: Backend | Across, x: Tensor, mu: Tensor, d: Definition, streams: Streams, samples: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Setting B: the center mu_hat, this call's mean included, sigma about it, and which of the g steps are finite.

    F is pure and treats every statistic separately, so it can estimate the mean before sigma exists. A step whose
    sigma overflows while its mean does not must not enter the centers of later steps: the first such step is left out
    and the rest recomputed. Only a cycle of several steps needs this, and it synchronizes with the device.
    """
    assert streams.H1 is not None
    row = pack_row(mu, d.ref)
    if streams.recall is not None:
        if streams.recall[0][:, 0].shape != row.shape:
            raise_forgotten()
        center = unpack_row(streams.recall[1][:, 0], mu)
        return center, kernel.sigma(x, d, mu, center), None
    ok = finite(row)
    while True:
        center = unpack_row(streams.H1.peek_mean(row, ok, samples), mu)
        sigma = kernel.sigma(x, d, mu, center)
        if len(row) == 1:
            return center, sigma, ok
        if is_traced():  # values cannot be read: all that follows the first such step is left out with it
            good = finite(pack_row(sigma, d.ref), ok)
            return center, sigma, None if good is None else good.long().cumprod(0) > 0
        good = finite(pack_row(sigma, d.ref), ok)
        bad = None if good is None else ~good if ok is None else ok & ~good
        if bad is None or not bad.any():
            return center, sigma, good
        ok = ~(bad & (bad.cumsum(0) == 1)) & (True if ok is None else ok)


def _recalled(s: Tensor, recall: tuple[Tensor, Tensor]) -> Tensor:
    """The estimates of the call that is recomputed, after checking by ``s`` that it is that call."""
    before, estimates = recall
    expect_the_same(s, before)
    return estimates


def expect_the_same(s: Tensor, before: Tensor) -> None:
    """Raise unless recomputed statistics equal the original ones."""
    # The same operations on the same numbers: at most the rounding differs, with another number of threads.
    if s.shape != before.shape or not torch.allclose(s, before, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise_forgotten()


def raise_forgotten() -> NoReturn:
    """Raise for a call that cannot be recomputed."""
    raise RuntimeError(
        "activation checkpointing computes a normalization again that was called once more since, so that its "
        "statistics are gone; checkpoint a part of the model that calls the layer once, or leave it out"
    )


def normalize(
    x: Tensor,
    definition: Definition,
    streams: Streams,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalize ``x (g, m, G, q, *place)`` in training.

    Args:
        gain, shift: ``(c,)``, the affine map that follows; only where ``joins`` holds.

    Returns:
        ``y`` of the shape and dtype of x; F's estimate at each of the g steps and its input s, ``(g, 2, ...)``, or None
        without an H1.
    """
    return _Normalize.apply(x, gain, shift, definition, streams)


def normalize_alone(x: Tensor, definition: Definition) -> Tensor:
    """Normalize ``x (g, m, G, q, *place)`` by its own statistics, with no memory (Algorithm 1): a plain function in
    torch operations, for ``torch.func``, compilers, and derivatives of any order and mode."""
    return normalize_traced(x, definition, Streams(None, None, uses_estimate=False))


def joins(x: Tensor, definition: Definition) -> bool:
    """Whether ``normalize`` can include the gain and bias."""
    kernel = choose(definition, x)
    return kernel is eager and eager.joins(x, definition)


def normalize_fixed(x: Tensor, definition: Definition, estimate: Tensor, known: Tensor | None = None) -> Tensor:
    """Testing: ``y = N(x, s_hat)`` with a constant ``estimate (2, ...)`` (Algorithms 3 and 5). Plain autograd.

    Args:
        known: whether there is an estimate; if not, mean 0 and sigma 1 stand in for it, as in batch normalization that
            has seen nothing. A tensor, for no branch may depend on a value under tracing.
    """
    data = x.to(torch.promote_types(x.dtype, torch.float32))
    groups, features = x.shape[2], estimate.shape[1]
    place = [1] * (x.ndim - 4) if definition.ref.place == "all" else estimate.shape[2:]
    # A copy: further training must not change what is saved for the backward pass.
    constant = estimate.to(data.dtype, copy=True)
    if known is not None:
        nothing = torch.stack([torch.zeros_like(constant[0]), torch.ones_like(constant[1])])
        constant = torch.where(known, constant, nothing)
    mu_hat, sigma_hat = constant.reshape(2, 1, 1, groups, features // groups, *place).unbind(0)
    kernel = choose(definition, None) if known is None else generic
    return kernel.apply(data, definition, mu_hat, sigma_hat).to(x.dtype)
