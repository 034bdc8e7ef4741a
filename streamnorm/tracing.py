"""Whether torch operations are being traced, and whether values can be read. Imports torch alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module


def is_traced() -> bool:
    """Whether torch operations are recorded or rewritten: by a compiler, an export, a dispatch mode, ``torch.func`` or
    forward-mode derivatives. These would not see what a compiled kernel does, nor a branch on a value."""
    return (
        is_dynamo_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_readable(x: Tensor) -> bool:
    """Whether a branch may depend on values of ``x``: on a CPU, without a synchronization, and nothing is traced."""
    return x.is_cpu and not is_traced()


def has_global_hook() -> bool:
    """Whether hooks are registered for the forward or backward passes of all modules."""
    return any(
        (
            module._global_forward_pre_hooks,
            module._global_forward_hooks,
            module._global_backward_pre_hooks,
            module._global_backward_hooks,
        )
    )


def has_autocast(device: str) -> bool:
    """Whether autocast exists for this type of device."""
    return torch.amp.is_autocast_available(device)


def refuse_recorded() -> None:
    """Raise where a traced training call of a layer with a memory would be silently wrong.

    Raises:
        RuntimeError: for an export, which loses the gradient of G; and for compiled activation checkpointing, which
            recomputes a call with statistics that have changed since.
    """
    _refuse_export()
    if is_dynamo_compiling():
        _refuse_checkpointing()


def _refuse_export() -> None:
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "a streamnorm layer that remembers cannot be exported in training: the exported graph would have no "
            "gradient for it; export model.eval()"
        )


def _refuse_checkpointing() -> None:
    # An enclosing checkpoint is on the compiler's stack, or on the stack of hooks.
    of: Any = torch._C
    top = getattr(of._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        raise RuntimeError(
            f"torch {torch.__version__} cannot tell whether a compiled streamnorm layer is inside activation "
            "checkpointing, where its training would be wrong; compile in evaluation only, or use a newer torch"
        )
    hooks = top(True)
    where = "" if hooks is None else getattr(hooks[0], "__qualname__", "")
    tracer = sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator.current_tx().output.current_tracer
    while tracer is not None:
        where += str(getattr(tracer, "source_target", ""))
        tracer = tracer.parent
    if "checkpoint" in where:
        raise RuntimeError(
            "activation checkpointing computes a streamnorm layer again, and compiled it would do so from statistics "
            "that have moved on; leave the layer out of what is checkpointed, or the checkpoint out of what is compiled"
        )


for _asked in (has_autocast, _refuse_export, _refuse_checkpointing):
    _asked._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiler runs them, and does not trace them
