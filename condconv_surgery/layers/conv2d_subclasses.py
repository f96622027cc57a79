"""Subclasses of ``nn.Conv2d`` that compute something else than ``nn.Conv2d``, and what they compute.

They are recognised by the full name of the class whose ``forward`` runs, so no library is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.ops.geometry import TF_SAME, ConvGeometry

PADDINGS = {
    "timm.layers.conv2d_same.Conv2dSame": TF_SAME,
    "timm.layers.std_conv.StdConv2dSame": TF_SAME,
    "timm.layers.std_conv.ScaledStdConv2dSame": TF_SAME,
    "efficientnet_pytorch.utils.Conv2dDynamicSamePadding": TF_SAME,
}
"""The padding of these classes, always with zeros. Where there is an attribute ``same_pad``, only if it is true."""

CONSTANT_PADDINGS = (
    "condconv_surgery.layers.conv2d_subclasses.PaddedConv2d",
    "efficientnet_pytorch.utils.Conv2dStaticSamePadding",
)
"""Classes that pad with zeros by constant amounts, which may differ between sides; and any class that the user asserts
to be equivalent, if it has a ``static_padding``."""

STANDARDISED = (
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
)
"""Classes that standardise their weight at each call (``layers.weight_forms.weight_standardisation``)."""


class PaddedConv2d(nn.Conv2d):
    """``nn.Conv2d`` of an input that is padded with zeros before: [B, I, H, W] -> [B, O, H', W'].

    padding: pixels on the left, right, top and bottom. The other arguments are those of ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, padding: tuple[int, int, int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.amounts = padding

    def forward(self, input: Tensor) -> Tensor:
        padded: Tensor = self._conv_forward(F.pad(input, self.amounts), self.weight, self.bias)
        return padded

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, amounts={self.amounts}"  # type: ignore[no-untyped-call]


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


def padding_of(module: nn.Conv2d) -> tuple[int, int] | tuple[int, int, int, int] | int | str:
    """The padding that a convolution applies: that of its class if it is listed above, else its attribute."""
    amounts = constant_padding(module)
    if amounts is not None:
        left, right, top, bottom = amounts
        return (top, left) if left == right and top == bottom else amounts
    known = PADDINGS.get(forward_of(type(module))) if getattr(module, "same_pad", True) else None
    return module.padding if known is None else known  # type: ignore[return-value]


def constant_padding(module: nn.Module) -> tuple[int, int, int, int] | None:
    """Pixels of zeros on the left, right, top and bottom, where a class pads by more than its attribute says."""
    inner = module._modules.get("static_padding")
    if isinstance(module, PaddedConv2d):
        extra = module.amounts
    elif isinstance(module, nn.Conv2d) and isinstance(inner, (nn.ZeroPad2d, nn.Identity)):
        extra = inner.padding if isinstance(inner, nn.ZeroPad2d) else (0, 0, 0, 0)
    else:
        return None
    high, wide = (0, 0) if isinstance(module.padding, str) else module.padding
    left, right, top, bottom = extra
    return (left + wide, right + wide, top + high, bottom + high)


def is_standardised(module: nn.Module) -> bool:
    """Whether the module standardises its weight at each call."""
    return forward_of(type(module)) in STANDARDISED


def is_understood(cls: type[nn.Module]) -> bool:
    """Whether a conditional layer can replace modules of this class."""
    plain = cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
    return plain or is_known_otherwise(cls)


def is_known_otherwise(cls: type[nn.Module]) -> bool:
    """Whether a class computes something else than ``nn.Conv2d`` that is listed here."""
    return forward_of(cls) in (*PADDINGS, *CONSTANT_PADDINGS, *STANDARDISED)


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
