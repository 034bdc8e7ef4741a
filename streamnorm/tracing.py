"""Whether somebody records or rewrites torch operations, and whether values may be looked at. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced() -> bool:
    """Whether something records or rewrites torch operations: a compiler, an exporter, a dispatch mode, a transform of
    functions, forward-mode derivatives. It would not see what a compiled kernel does, nor a branch on a value."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_readable(x: Tensor) -> bool:
    """Whether a branch may depend on values of ``x``: they lie on a CPU, where nobody waits, and nothing is traced."""
    return x.is_cpu and not is_traced()
