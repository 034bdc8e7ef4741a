"""From torch's normalization layers to ours, in place. Imports the layers and the tree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from streamnorm.conversion.sources import Source, is_source, read
from streamnorm.conversion.tree import Where, emptied, exchange, places, selected
from streamnorm.definition.operation import Scale
from streamnorm.nn.affine import Affine
from streamnorm.nn.arranged import Arranged
from streamnorm.nn.checkpoints import is_initial, remembered, why_not_running
from streamnorm.nn.layers import BatchNorm, SampleNorm, StreamingNorm
from streamnorm.nn.norm import Norm

Make = Callable[..., Norm]
KEPT = "affine", "device", "dtype", "num_features"
"""Options that the converted layer determines."""
ORIGIN = "_origin"
"""The attribute of a converted layer that tells ``to_torch`` what it was."""


def convert(model: nn.Module, to: Make = StreamingNorm, where: Where | None = None, **options: Any) -> nn.Module:
    """Exchange the normalization layers of torch in a model for ours, in place.

    Kept are gain and bias (the same parameters, so that an optimizer made before still holds them), running statistics,
    mode, device, dtype and hooks. A layer that stands in several places is converted once and shared again; what holds
    it outside the modules, such as a plain list, keeps the old one. ``y`` in
    evaluation is the same as before if the layer has running statistics and ``to`` keeps a memory: ``sigma =
    sqrt(running_var + eps)`` becomes its estimate and, counted as full, what it remembers.

    ::

        of torch       to=SampleNorm: the same outputs   StreamingNorm, BatchNorm
        BatchNorm*     SP2: other statistics, a warning  BA1
        LayerNorm      SP2, features last (Arranged)     BA1, features last
        RMSNorm        likewise, Lp(2, "zero"), Scale()  likewise, Lp(2, "zero"), Scale()
        GroupNorm      NormRef(groups, "all", "one")     BA1
        InstanceNorm*  SP1                               SP1 about its own mean, BA1

    Where a layer of torch has no memory, and where its running statistics are still the initial ones, a streaming or
    batch normalization begins with an empty memory: train it before it is tested. Training differs from torch's: our
    ``BatchNorm`` averages sigma, without the factor n / (n - 1), and torch the variance with it. So after training on
    other data their estimates differ, by some 10 % at 8 samples a batch.

    Args:
        model: any module; if it is such a layer itself, the new layer is returned.
        to: ``StreamingNorm``, ``BatchNorm``, ``SampleNorm``, a ``functools.partial`` of these, or a function of
            ``(num_features, **options)`` that makes a ``Norm``. The first four take eps, ``rate`` (torch's momentum)
            and the reference of the table from the layer, unless they are given; a function decides for itself.
        where: ``where(name, module)`` selects layers; None: all.
        options: for ``to``.

    Returns:
        The model.

    Raises:
        ValueError: for a model without such layers; and, with the name of the layer, for one that cannot be converted
            without a change of meaning: with a forward of its own, lazy or parametrized; for ``BatchNorm`` one that
            tests with the mini-batch (``track_running_stats=False``) or keeps a cumulative average
            (``momentum=None``, unless ``rate`` is given); running statistics of another kind than the new layer keeps.
            Nothing has changed then.
        TypeError: for options that are the layer's own, and for a ``to`` that makes anything but a ``Norm``.

    Warns:
        UserWarning: for running statistics that have no place in a layer without memory.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> y = model(torch.randn(4, 3, 8, 8))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> before = model.eval()(x)
    >>> convert(model, memory=1000)[1]
    StreamingNorm(8, memory=1000)
    >>> torch.allclose(model(x), before, atol=1e-6)
    True
    """
    for name in KEPT:
        if name in options:
            raise TypeError(f"{name} is that of each layer and is kept, got {name}={options[name]!r}; leave it out")
    sources = [
        read(names[0], module)
        for module, names in places(model).items()
        if is_source(module) and selected(names, module, where)
    ]
    if not sources:
        chosen = "" if where is None else " that where() selects"
        raise ValueError(
            f"{type(model).__name__} has no normalization layer of torch{chosen}: no BatchNorm, LayerNorm, GroupNorm, "
            "InstanceNorm or RMSNorm of torch.nn"
        )
    new, dropped, any_ = {}, [], next(chain(model.parameters(), model.buffers()), None)
    for source in sources:
        norm = _made(source, to, options, any_)
        if not _take_statistics(source, norm):
            dropped.append(source.name)
        arranged = source.last is not None or source.dims is not None
        new[source.module] = Arranged(norm, source.last, source.dims) if arranged else norm
        vars(new[source.module])[ORIGIN] = emptied(source.module)
    if dropped:
        shown = ", ".join(map(repr, dropped[:5])) + (" ..." if dropped[5:] else "")
        warnings.warn(
            f"running statistics have no place in layers without a memory, and outputs change; train anew: {shown}",
            stacklevel=2,
        )
    return exchange(model, new)


def _made(source: Source, to: Make, options: dict[str, Any], like: Tensor | None) -> Norm:
    """The norm, with the gain and bias of the source; like this tensor, if the source has none."""
    c, own = source.num_features, _own_options(source, to, options)
    weight, bias = source.gains
    like = next((t for t in (weight, *(source.statistics or ())) if t is not None), like)
    try:
        with nullcontext() if like is None or like.device == torch.get_default_device() else like.device:
            norm: Any = to(c, **own, **options)
            if isinstance(norm, Norm) and source.divides and own.get("center") == "zero":
                norm = Norm(c, norm.ref, norm.moment, norm.policy, op=Scale(), place=norm.place)
    except (TypeError, ValueError) as error:
        error.add_note(f"while streamnorm.convert made a layer for {source.name!r}; nothing has changed")
        raise
    if not isinstance(norm, Norm) or norm.num_features != c:
        raise TypeError(f"to makes a Norm of {c} features for {source.name!r}, as StreamingNorm does, got {norm!r}")
    norm.affine = None
    if weight is not None:
        norm.affine = Affine(c, device="meta", bias=bias is not None)
        norm.affine.weight, norm.affine.bias = weight, bias
        norm.mark_gains()
    for memory in (norm.H1, norm.H2):
        if memory is not None and like is not None:
            memory.to(like.device, like.dtype)
    return norm


def _own_options(source: Source, to: Make, options: dict[str, Any]) -> dict[str, Any]:
    """What the layer itself determines and nobody has given."""
    base, given = to, dict(options)
    while isinstance(base, partial):
        base, given = base.func, {**base.keywords, **given}
    inits = {kind: kind.__init__ for kind in (StreamingNorm, BatchNorm, SampleNorm)}
    kind = next((kind for kind, init in inits.items() if getattr(base, "__init__", None) is init), None)
    if kind is None or not isinstance(base, type):
        return {}
    own: dict[str, Any] = {"eps": source.eps, "affine": False}
    if kind is SampleNorm and not isinstance(source.module, _BatchNorm):
        own["ref"] = source.ref
    if kind is StreamingNorm and isinstance(source.module, _InstanceNorm):
        own |= {"ref": source.ref, "center": "batch"}
    if source.divides:
        own["center"] = "zero"
    if kind is BatchNorm and "rate" not in given:
        own |= _rate(source)
    return {name: value for name, value in own.items() if name not in given}


def _rate(source: Source) -> dict[str, float]:
    momentum = getattr(source.module, "momentum", 0.1) if source.statistics else 0.1
    if not momentum:
        average = "all mini-batches alike (momentum=None)" if momentum is None else "no mini-batch (momentum=0)"
        raise source.refuse(f"its running statistics average {average}, and BatchNorm a share of each; give rate=0.1")
    return {"rate": momentum}


def _take_statistics(source: Source, norm: Norm) -> bool:
    """Fill the memory of the norm with running statistics; False: they have no place in it.

    Raises:
        ValueError: if they are of another kind than the norm keeps, or it would test with others than the layer.
    """
    module, found, memory = source.module, source.statistics, norm.H1
    tracks = bool(getattr(module, "track_running_stats", False))
    if isinstance(module, _BatchNorm) and memory is not None and not norm.policy.uses_estimate and not tracks:
        raise source.refuse(
            "it tests with the mini-batch's own statistics (track_running_stats=False), and BatchNorm with a running "
            "estimate; make it with track_running_stats=True, or convert it to StreamingNorm"
        )
    if found is None:
        return True
    if isinstance(module, _InstanceNorm) and memory is None:
        raise source.refuse(
            "it tests with running statistics (track_running_stats=True), and SampleNorm with those of each sample; "
            "convert it to StreamingNorm"
        )
    if is_initial(*found):
        return True
    if memory is None:
        return False
    why = why_not_running(memory, norm.definition)
    if why is None and norm.ref.samples != source.ref.samples:
        why = f"they are those of {source.ref!r}, and its reference is {norm.ref!r}"
    if why is not None:
        raise source.refuse(
            f"its running statistics have no place in {norm!r}: {why}; to begin without them, call its "
            "reset_running_stats() first"
        )
    with torch.no_grad():
        memory.put_back(remembered(memory, *found, source.eps))
        memory.merged = memory.counts.clone()
    return True
