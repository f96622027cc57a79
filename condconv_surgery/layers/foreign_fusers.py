"""Fusers of convolution and batch norm in other packages, which would be silently wrong on a conditional layer.

``ConditionalConv2d.weight`` keeps the name that ``nn.Conv2d`` has: state dicts, weight decay by name and models that
read ``conv.weight.dtype`` go on working, and most code that takes it for [O, I, kh, kw] stops at its fifth dimension.
Fusers need not: with one expert, or as many as output channels, their shapes fit; mmcv's goes by class, passes over the
layer and folds the batch norm behind it into the plain convolution before it. These functions raise instead, with the
fold that is exact.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from condconv_surgery.errors import InputError

FUSERS = ("fuse_conv_bn_eval", "fuse_conv_and_bn", "fuse_conv_bn", "_fuse_conv_bn")
"""Of torch.nn.utils.fusion; Ultralytics, YOLOv5 and many that copied theirs; mmcv, which recurses; mmcv's inner one."""


def refuse_fuser(depth: int = 2) -> None:
    """Raise ``InputError`` where the function ``depth`` calls up is a fuser: 2, the caller of the caller."""
    if not torch.compiler.is_compiling() and (name := sys._getframe(depth).f_code.co_name) in FUSERS:
        raise _refused(f"{name} was given a conditional layer, or a model with some.")


def require_own_shape(name: str, value: Tensor | None, wanted: tuple[int, ...]) -> None:
    """Raise ``InputError`` for a weight or bias as fusers make it: [O, O, ...] or [E, O, ...] scaled, with bias [O].

    (Sharding replaces parameters by flat parts, which are let through.)
    """
    if value is None or tuple(value.shape) == wanted:
        return
    if (name == "weight" and value.dim() == len(wanted)) or (name == "bias" and value.shape == wanted[1:]):
        raise _refused(f"The {name} of a conditional layer was set to one of shape {tuple(value.shape)}.")


def _refused(given: str) -> InputError:
    return InputError(
        given,
        "A batch norm scales every expert, and its shift is one bias that no gate weighs: fusers for nn.Conv2d do "
        "neither.",
        "condconv_surgery.fold(model) in its place; for YOLO condconv_surgery.integrations.ultralytics",
    )
