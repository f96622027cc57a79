"""Layers inside adapters of PEFT: LoRA and others compute with the kernel of their base layer."""

from __future__ import annotations

from torch import nn

_BASES = ("peft.tuners.tuners_utils.BaseTunerLayer", "peft.utils.other.AuxiliaryTrainingWrapper")
"""Base classes of what PEFT puts in the place of a layer. They are recognised by name: PEFT need not be installed."""


def adapters_by_prefix(model: nn.Module) -> dict[str, str]:
    """For each adapter in ``model`` the prefix of the names inside it, and the name of its class."""
    return {
        f"{name}." if name else "": type(module).__qualname__
        for name, module in model.named_modules(remove_duplicate=False)
        if any(f"{cls.__module__}.{cls.__qualname__}" in _BASES for cls in type(module).__mro__)
    }
