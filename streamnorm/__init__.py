"""streamnorm: normalization for neural networks that learn from streams (Liao, Kawaguchi, Poggio 2016).

Every public name is loaded at its first use, so that the import itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamnorm.calibration.recalibrate import recalibrate as recalibrate
    from streamnorm.conversion.back import to_torch as to_torch
    from streamnorm.conversion.back import torch_state_dict as torch_state_dict
    from streamnorm.conversion.convert import convert as convert
    from streamnorm.conversion.folding import fold_into as fold_into
    from streamnorm.conversion.freezing import freeze as freeze
    from streamnorm.conversion.freezing import unfreeze as unfreeze
    from streamnorm.definition.operation import Scale as Scale
    from streamnorm.definition.operation import Standardize as Standardize
    from streamnorm.definition.ref import BA1 as BA1
    from streamnorm.definition.ref import BA2 as BA2
    from streamnorm.definition.ref import BA3 as BA3
    from streamnorm.definition.ref import BA4 as BA4
    from streamnorm.definition.ref import BA5 as BA5
    from streamnorm.definition.ref import BA6 as BA6
    from streamnorm.definition.ref import SP1 as SP1
    from streamnorm.definition.ref import SP2 as SP2
    from streamnorm.definition.ref import SP3 as SP3
    from streamnorm.definition.ref import SP4 as SP4
    from streamnorm.definition.ref import SP5 as SP5
    from streamnorm.definition.ref import NormRef as NormRef
    from streamnorm.definition.stats import DegenerateReferenceError as DegenerateReferenceError
    from streamnorm.definition.stats import Lp as Lp
    from streamnorm.monitoring.monitor import Monitor as Monitor
    from streamnorm.monitoring.monitor import monitor as monitor
    from streamnorm.nn.affine import Affine as Affine
    from streamnorm.nn.layers import BatchNorm as BatchNorm
    from streamnorm.nn.layers import SampleNorm as SampleNorm
    from streamnorm.nn.layers import StreamingNorm as StreamingNorm
    from streamnorm.nn.norm import Norm as Norm
    from streamnorm.nn.recurrent.cells import NormGRUCell as NormGRUCell
    from streamnorm.nn.recurrent.cells import NormLSTMCell as NormLSTMCell
    from streamnorm.nn.recurrent.cells import NormRNNCell as NormRNNCell
    from streamnorm.nn.recurrent.layers import NormGRU as NormGRU
    from streamnorm.nn.recurrent.layers import NormLSTM as NormLSTM
    from streamnorm.nn.recurrent.layers import NormRNN as NormRNN
    from streamnorm.nn.rivals import BatchRenorm as BatchRenorm
    from streamnorm.nn.rivals import OnlineNorm as OnlineNorm
    from streamnorm.nn.timespecific import TimeSpecific as TimeSpecific
    from streamnorm.stream import Exponential as Exponential
    from streamnorm.stream import GradientRule as GradientRule
    from streamnorm.stream import LongShort as LongShort
    from streamnorm.stream import Memory as Memory
    from streamnorm.stream import Pooled as Pooled
    from streamnorm.stream import Residual as Residual
    from streamnorm.stream import Rule as Rule
    from streamnorm.stream.policy import Batch as Batch
    from streamnorm.stream.policy import Evidence as Evidence
    from streamnorm.stream.policy import Policy as Policy
    from streamnorm.stream.policy import Sample as Sample
    from streamnorm.stream.policy import Streaming as Streaming
    from streamnorm.train.attach import attach as attach
    from streamnorm.train.dau import DAU as DAU
    from streamnorm.train.loss_scale import loss_scale as loss_scale
    from streamnorm.train.online.trainer import OnlineTrainer as OnlineTrainer
    from streamnorm.train.synchronize import synchronize as synchronize
    from streamnorm.train.vectorized import vectorized as vectorized
    from streamnorm.train.warmup import Warmup as Warmup

_NAMES = {
    "calibration.recalibrate": ("recalibrate",),
    "conversion.back": (
        "to_torch",
        "torch_state_dict",
    ),
    "conversion.convert": ("convert",),
    "conversion.folding": ("fold_into",),
    "conversion.freezing": (
        "freeze",
        "unfreeze",
    ),
    "definition.operation": (
        "Scale",
        "Standardize",
    ),
    "definition.ref": (
        "BA1",
        "BA2",
        "BA3",
        "BA4",
        "BA5",
        "BA6",
        "SP1",
        "SP2",
        "SP3",
        "SP4",
        "SP5",
        "NormRef",
    ),
    "definition.stats": (
        "DegenerateReferenceError",
        "Lp",
    ),
    "monitoring.monitor": (
        "Monitor",
        "monitor",
    ),
    "nn.affine": ("Affine",),
    "nn.layers": (
        "BatchNorm",
        "SampleNorm",
        "StreamingNorm",
    ),
    "nn.norm": ("Norm",),
    "nn.recurrent.cells": (
        "NormGRUCell",
        "NormLSTMCell",
        "NormRNNCell",
    ),
    "nn.recurrent.layers": (
        "NormGRU",
        "NormLSTM",
        "NormRNN",
    ),
    "nn.rivals": (
        "BatchRenorm",
        "OnlineNorm",
    ),
    "nn.timespecific": ("TimeSpecific",),
    "stream": (
        "Exponential",
        "GradientRule",
        "LongShort",
        "Memory",
        "Pooled",
        "Residual",
        "Rule",
    ),
    "stream.policy": (
        "Batch",
        "Evidence",
        "Policy",
        "Sample",
        "Streaming",
    ),
    "train.attach": ("attach",),
    "train.dau": ("DAU",),
    "train.loss_scale": ("loss_scale",),
    "train.online.trainer": ("OnlineTrainer",),
    "train.synchronize": ("synchronize",),
    "train.vectorized": ("vectorized",),
    "train.warmup": ("Warmup",),
}
"""The public names of each module, as above."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]
_ROOMS = ("calibration", "conversion", "definition", "monitoring", "nn", "ops", "oracle", "stream", "train")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_ROOMS})
