"""The layer: normalization as a ``torch.nn`` module, and the gain and bias that follow it (paper, section 3).

``Norm`` is the whole framework, R x S x policy. Imports the op and what stands below it.

Legend: ``n`` inputs along the first axis = ``g`` mini-batches (steps of the stream) of ``m`` samples; ``c`` features;
``place`` = x, y, z.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.checks import expect_sizes, is_whole
from streamnorm.definition.layer import Definition
from streamnorm.definition.masked import expect_mask
from streamnorm.definition.operation import Scale, Standardize
from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import Lp
from streamnorm.nn.affine import Affine, Device
from streamnorm.nn.checkpoints import translate
from streamnorm.nn.private import mark
from streamnorm.nn.replicas import merge, settled
from streamnorm.nn.training import Calls, Trainable, empty
from streamnorm.nn.updates import Follows, enlist
from streamnorm.ops import backends
from streamnorm.ops import functional as _op
from streamnorm.stream import Memory
from streamnorm.stream.policy import Policy
from streamnorm.tracing import is_readable, is_traced


class Norm(Trainable):
    """A normalization layer: NormRef x NormStats x policy (section 3), the framework in one class.

    ``y = N(x, s_hat)`` with ``s = S(R)``; the policy defines s_hat and its gradient.

    Args:
        num_features: c.
        ref: R, one of ``SP1 ... SP5``, ``BA1 ... BA6``, any ``NormRef`` or one of your own.
        moment: S, ``Lp(p, center)`` or one of your own.
        policy: ``Sample()``, ``Batch()``, ``Streaming()`` or one of your own with F and G.
        affine: add a gain and a bias per feature (``Affine``).
        op: N, ``Standardize()`` as in the paper, ``Scale()``, or one of your own.
        device, dtype: as torch's; statistics stay float32 or wider.
        place: the size of the map, for references with statistics for every place, so that buffers have their shape
            from the start. None: taken from the first input.

    Shapes: ``x (n, c)``, ``(n, c, x)``, ``(n, c, x, y)`` or ``(n, c, x, y, z)`` -> ``y`` of the same shape and dtype.
    Statistics are kept in float32 or wider.

    ``layer(x, mask=mask)`` with a boolean ``mask (n, *place)``, for padded sequences and maps: statistics and gradients
    are those of the activations where it is true, and y is 0 where it is false.

    A layer with a memory hears of every ``optimizer.step()`` of the ``torch.optim.Optimizer`` that holds its gain
    (``nn.updates``). For updates of another kind call ``fold()`` after each.

    Raises:
        ValueError: for a rank, feature count or map size other than the layer's, and for Setting A with a single
            activation in a reference; the state is unchanged then.

    >>> from streamnorm import BA1, Lp, Streaming
    >>> layer = Norm(3, BA1, Lp(2, "estimate"), Streaming())
    >>> y = layer(torch.randn(8, 3))
    >>> layer.fold()
    >>> layer.eval()(torch.randn(1, 3)).shape
    torch.Size([1, 3])
    """

    place: tuple[int, ...] | None = None

    def __init__(
        self,
        num_features: int,
        ref: NormRef,
        moment: Lp,
        policy: Policy,
        affine: bool = False,
        op: Standardize | Scale | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        place: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not is_whole(num_features):
            raise ValueError(f"num_features is a number of features >= 1, got {num_features!r}")
        if not isinstance(ref, NormRef):
            raise TypeError(f"ref is a NormRef such as streamnorm.BA1, got {ref!r}")
        if not isinstance(policy, Policy):
            raise TypeError(f"policy is a Policy such as streamnorm.Streaming(), got {policy!r}")
        self.num_features = num_features
        self.definition = Definition(ref, moment, op or Standardize())
        self.policy = policy
        self.steps = 1
        self.reverse = False
        self.unit = 1
        self.loss_scale = 1.0
        _check_pairing(ref, moment, policy)
        if place is not None:
            expect_sizes("place", place)
            self.place = tuple(place)
        shape = (2, ref.groups(num_features)) if ref.place == "all" and ref.is_built_in else None
        if shape is None and self.place is not None:
            view = ref.view(torch.zeros(2, num_features, *self.place, device="cpu"))
            shape = (2, *_op.pack_row(ref.mean(view), ref).shape[1:])
        self.H1 = None if policy.F is None else Memory(policy.F, shape)
        self.H2 = None if policy.G is None else Memory(policy.G, shape)
        self.affine = Affine(num_features) if affine else None
        self.mark_gains()
        self._calls = Calls()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        if self.H1 is not None:
            enlist(self)

    def mark_gains(self) -> None:
        """Say that gain and bias belong to a layer that mixes samples, if it does."""
        if self.affine is not None and self.H1 is not None:
            mark(self.affine)

    @property
    def is_updated(self) -> bool:
        """Whether a memory changes at a weight update."""
        return any(memory is not None and memory.rule.folds for memory in (self.H1, self.H2))

    @property
    def weight(self) -> nn.Parameter | None:
        """The gain of ``affine``, or None."""
        return None if self.affine is None else self.affine.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of ``affine``, or None."""
        return None if self.affine is None else self.affine.bias

    @property
    def follows(self) -> Follows:
        """Whose steps are its weight updates."""
        return self._calls.follows

    @property
    def reference_size(self) -> int | None:
        """How many activations the smallest reference of the latest training call held."""
        return self._calls.reference_size

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return self._normalize_masked(x, mask)
        return self._normalize(x, self._modules.get("affine"))

    def normalize(self, x: Tensor) -> Tensor:
        """``forward`` without the gain and bias."""
        return self._normalize(x, None)

    def _normalize_masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """``forward`` where ``mask`` is true, and 0 elsewhere."""
        self._view(x, steps=1)
        expect_mask(mask, x, self.ref)
        if self.training:
            self._refuse_shared("with a mask")
        affine = self._modules.get("affine")
        if not self.training and self.H1 is not None:
            y = self._normalize(x, affine)
        elif is_readable(mask) and not mask.any():
            y = empty(x, affine)
        else:
            y = self._train(x, affine, mask)
        return y.masked_fill(~mask.unsqueeze(1), 0)

    def _normalize(self, x: Tensor, affine: nn.Module | None) -> Tensor:
        remembers = self._modules.get("H1") is not None
        if not self.training and remembers:
            y = self._test(x)
            return y if affine is None else affine(y)
        if not remembers and not (isinstance(x, Tensor) and is_readable(x)):
            view = self._check(x, 1)
            y = _op.normalize_alone(view, self.definition).reshape(x.shape) if view.numel() else x.clone()
            return y if affine is None else affine(y)
        return self._train(x, affine)

    def normalize_by(self, x: Tensor, s: Tensor) -> Tensor:
        """``N(x, s)`` with constant statistics; with mean 0 and sigma 1 if there are none."""
        return _op.normalize_fixed(self._view(x, steps=1), self.definition, s, s[-1].any()).reshape(x.shape)

    def _test(self, x: Tensor) -> Tensor:
        memory = self.H1
        assert memory is not None
        if memory.shaped and not is_readable(memory.seen):
            return self.normalize_by(x, memory.estimate)
        view = self._view(x, steps=1)
        if torch.is_grad_enabled():
            self._calls.follows.evaluated += 1
        if memory.shaped and memory.known:
            return _op.normalize_fixed(view, self.definition, memory.estimate).reshape(x.shape)
        if not view.numel():
            return x.clone()
        if not self._calls.has_warned:
            self._calls.has_warned = True
            warnings.warn(
                f"{type(self).__name__} is tested (eval mode) before it has seen any training data: mean 0 and sigma 1 "
                "stand in for its statistics",
                stacklevel=4,
            )
        s = memory.estimate if memory.shaped else torch.cat([_op.pack_row(self.ref.mean(view), self.ref)] * 2)
        return _op.normalize_fixed(view, self.definition, s, s.new_zeros((), dtype=torch.bool)).reshape(x.shape)

    def fold(self, happened: Tensor | bool = True) -> None:
        """A weight update took place: long <- kappa1 long + kappa2 short, short emptied (section 3.3.1, 3.3.2).

        Several processes first merge what they have seen (``synchronize``), so all of them have to call it.
        """
        for layer, has_stepped in merge([self], happened):
            layer.fold_alone(has_stepped)

    def fold_alone(self, happened: Tensor | bool = True) -> None:
        """``fold`` where several processes have merged already."""
        alike = self.replicas is not None and self.replicas.merges  # digit by digit the same in all processes
        fused = not alike and self._calls.fused and self.compiled()
        if happened is not True or not fused or not backends.may_use("cpu") or is_traced() or not fused.fold():
            for memory in (self.H1, self.H2):
                if memory is not None:
                    memory.fold(happened)
        if alike:
            settled(self, happened)
        self._calls.follows.folded(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(prefix + name in state_dict for name in ("weight", "bias", "running_mean")):
            gains = [name for name in ("weight", "bias") if getattr(self, name) is not None]
            memories = self.H1, self.H2
            homeless = translate(state_dict, prefix, set(self.state_dict()), gains, memories, self.definition)
            if homeless:
                warnings.warn(
                    f"what is loaded into {prefix[:-1] or 'it'} ({type(self).__name__}) comes from a layer of torch: "
                    f"{homeless}",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": Calls(reference_size=self.reference_size)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        calls = Calls(reference_size=state["_calls"].reference_size)
        super().__setstate__({"loss_scale": 1.0, **state, "_calls": calls})
        self.mark_gains()
        if self.H1 is not None:
            enlist(self)

    def __repr__(self) -> str:
        options = ", affine=True" if self.affine is not None else ""
        if self.definition.op != Standardize():
            options += f", op={self.definition.op!r}"
        if self.place is not None:
            options += f", place={self.place!r}"
        return f"Norm({self.num_features}, {self.ref!r}, {self.moment!r}, {self.policy!r}{options})"


def _check_pairing(ref: NormRef, moment: Lp, policy: Policy) -> None:
    if not policy.uses_estimate:
        if policy.F is None and ref.samples != "one":
            raise ValueError(f"{policy!r} looks at one sample, {ref!r} at the mini-batch; use SP1 ... SP5, or Batch()")
        if policy.F is not None and ref.samples != "batch":
            raise ValueError(f"{policy!r} looks at the mini-batch, {ref!r} at one sample; use BA1 ... BA6, or Sample()")
    elif policy.F is None:
        raise ValueError(f"{policy!r} trains with F's estimate (uses_estimate) and has no F")
    if policy.F is None and getattr(moment, "center", None) == "estimate":
        raise ValueError(f'center="estimate" (Setting B) needs a running estimate and {policy!r} keeps none')


def norms(model: nn.Module) -> Iterator[Norm]:
    """Every ``Norm`` layer of a model, each once."""
    return (module for module in model.modules() if isinstance(module, Norm))
