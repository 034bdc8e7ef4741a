"""The modules of a model by name, exchanging some of them, and what goes along. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Where = Callable[[str, nn.Module], bool]
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all names that it has in the model, in order; the model's own is "" ."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def called(name: str, module: nn.Module) -> str:
    """A module in an error: its name and class."""
    return f"{name!r} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def selected(names: list[str], module: nn.Module, where: Where | None) -> bool:
    """Whether ``where`` selects a module.

    Raises:
        ValueError: if it selects it at one of its places and not at another.
    """
    if where is None:
        return True
    votes = {bool(where(name, module)) for name in names}
    if len(votes) > 1:
        raise ValueError(
            f"{called(names[0], module)} stands in {len(names)} places, {', '.join(map(repr, names))}, and where() "
            "selects it in some of them; one module is exchanged everywhere or nowhere"
        )
    return votes.pop()


def exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in the places of old ones, in place; returns the model, or what takes its place.

    Hooks of calls move to the new modules, with the handles that remove them, and so does the mode."""
    for before, after in new.items():
        for name in HOOKS:
            vars(after)[name] = vars(before)[name]
        after.train(before.training)
    for parent in list(model.modules()):
        if parent not in new:
            for name, child in parent._modules.items():
                if child is not None and child in new:
                    parent._modules[name] = new[child]
    return new.get(model, model)


def emptied(module: nn.Module) -> nn.Module:
    """A copy of a module without its values: parameters and buffers on the meta device, no hooks."""
    copy = module.__class__.__new__(module.__class__)
    vars(copy).update(vars(module))
    nothing = nn.Module()
    for name in HOOKS:
        vars(copy)[name] = vars(nothing)[name]
    for kind in ("_parameters", "_buffers"):
        values: dict[str, Any] = getattr(module, kind)
        vars(copy)[kind] = {
            name: None if value is None else value.detach().to("meta") for name, value in values.items()
        }
    return copy
