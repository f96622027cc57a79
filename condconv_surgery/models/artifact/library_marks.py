"""Marks of this package, transformers and Accelerate on modules, and hooks that capture outputs for a model that asks.

They are no part of what a model computes, and an artifact leaves them out.
"""

from __future__ import annotations

import sys

from torch import nn

from condconv_surgery.surgery.upcycle import has_hooks

_HOME = "transformers.utils.output_capturing"

AS_BUILT = "condconv_as_built"
"""Attribute of a model that a user's factory built: see ``as_built``."""

MARKS = ("_is_hf_initialized", "_output_capturing_hooks_installed", "_is_accelerate_prepared", AS_BUILT)
"""Attributes by which they know what they have done to a module: what is missing is done again when needed."""

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def has_lasting_hooks(module: nn.Module) -> bool:
    """Has ``module`` other hooks than those?"""
    hooks = [hook for kind in _FORWARD_HOOKS for hook in getattr(module, kind).values()]
    captures = [hook for hook in hooks if getattr(hook, "__module__", "") == _HOME]
    return has_hooks(module) and (len(captures) < len(hooks) or not hooks)


def register_captures(module: nn.Module) -> None:
    """Say which outputs a model of transformers can capture, as its constructor does, for one made without it."""
    registry = getattr(sys.modules.get(_HOME), "_CAN_RECORD_REGISTRY", None)
    if registry is not None and hasattr(type(module), "_can_record_outputs"):
        registry[module] = module._can_record_outputs
