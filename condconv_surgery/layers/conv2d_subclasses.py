"""Subclasses of ``nn.Conv2d`` that compute something else than ``nn.Conv2d``, and what they compute.

They are recognised by the full name of the class whose ``forward`` runs, so no library is imported.
"""

from __future__ import annotations

import importlib

from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.ops.geometry import TF_SAME, ConvGeometry

PADDINGS = {
    "timm.layers.conv2d_same.Conv2dSame": TF_SAME,
    "timm.layers.std_conv.StdConv2dSame": TF_SAME,
    "timm.layers.std_conv.ScaledStdConv2dSame": TF_SAME,
}
"""The padding of these classes, always with zeros. Where there is an attribute ``same_pad``, only if it is true."""

STANDARDISED = (
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
)
"""Classes that standardise their weight at each call (``layers.weight_standardisation``)."""


def geometry_of(module: nn.Conv2d | nn.Linear) -> ConvGeometry:
    """The geometry of a convolution, or of a Linear as a 1x1 convolution."""
    if isinstance(module, nn.Linear):
        return ConvGeometry.make(module.in_features, module.out_features, 1)
    return ConvGeometry.make(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        padding_of(module),
        module.dilation,  # type: ignore[arg-type]
        module.groups,
        module.padding_mode,
    )


def padding_of(module: nn.Conv2d) -> tuple[int, int] | int | str:
    """The padding that a convolution applies: that of its class if listed in ``PADDINGS``, else its attribute."""
    known = PADDINGS.get(forward_of(type(module))) if getattr(module, "same_pad", True) else None
    return module.padding if known is None else known  # type: ignore[return-value]


def is_standardised(module: nn.Module) -> bool:
    """Whether the module standardises its weight at each call."""
    return forward_of(type(module)) in STANDARDISED


def is_understood(cls: type[nn.Module]) -> bool:
    """Whether a conditional layer can replace modules of this class."""
    plain = cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
    return plain or is_known_otherwise(cls)


def is_known_otherwise(cls: type[nn.Module]) -> bool:
    """Whether a class computes something else than ``nn.Conv2d`` that is listed here."""
    return forward_of(cls) in PADDINGS or forward_of(cls) in STANDARDISED


def layer_of_timm(name: str) -> type[nn.Conv2d]:
    """The class of that name in ``timm.layers``. Raises ``InputError`` without timm."""
    try:
        found: type[nn.Conv2d] = getattr(importlib.import_module("timm.layers"), name)
    except ImportError as error:
        raise InputError(
            f"The plain layer that a conditional one stands for is timm's {name}, and timm is not installed.",
            "torch has no such layer.",
            'pip install "condconv-surgery[timm]"',
        ) from error
    return found


def forward_of(cls: type[nn.Module]) -> str:
    """The full name of the class that has the ``forward`` of ``cls``."""
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), cls)
    return full_name(owner)


def full_name(cls: type) -> str:
    """Module and name of a class, as in ``torch.nn.modules.conv.Conv2d``."""
    return f"{cls.__module__}.{cls.__qualname__}"
