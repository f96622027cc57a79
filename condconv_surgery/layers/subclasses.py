"""Subclasses of ``nn.Conv2d`` that compute something else, and what is known of them.

They are told by the full name of the class whose ``forward`` runs, so that no library is imported to look.
"""

from __future__ import annotations

import importlib

from torch import nn

from condconv_surgery.errors import InputError

TF_SAME = "tf_same"
"""The padding of TensorFlow's "SAME": ``ceil(H / stride)`` positions, with margins that follow from the size of the
input; the odd pixel goes to the right and to the bottom."""

PADDINGS = {"timm.layers.conv2d_same.Conv2dSame": TF_SAME}
"""Classes that are a plain convolution but for this padding, always with zeros."""


def padding_of(module: nn.Conv2d) -> tuple[int, int] | int | str:
    """What a convolution pads with: as its class computes it, or else its attribute."""
    return PADDINGS.get(_forward_of(type(module)), module.padding)  # type: ignore[arg-type]


def is_understood(cls: type[nn.Module]) -> bool:
    """Whether a class computes a plain convolution, with a padding that ``ConvGeometry`` has."""
    plain = cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
    return plain or _forward_of(cls) in PADDINGS


def conv2d_same() -> type[nn.Conv2d]:
    """timm's convolution with the padding ``TF_SAME``, which torch has not. Raises ``InputError`` without timm."""
    try:
        found: type[nn.Conv2d] = importlib.import_module("timm.layers").Conv2dSame
    except ImportError as error:
        raise InputError(
            f"A plain convolution with the padding {TF_SAME!r} is timm's Conv2dSame, and timm is not installed.",
            "torch has no layer that pads by the size of its input.",
            'pip install "condconv-surgery[timm]"',
        ) from error
    return found


def _forward_of(cls: type[nn.Module]) -> str:
    """The full name of the class that has the ``forward`` of ``cls``."""
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), cls)
    return f"{owner.__module__}.{owner.__qualname__}"
