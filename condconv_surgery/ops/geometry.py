"""The geometry of a convolution: channels, kernel size, stride, padding, dilation, groups; not its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.errors import InputError

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

TF_SAME = "tf_same"
"""TensorFlow's "SAME" padding: ``ceil(H / stride)`` output positions. The padding depends on the input size; an odd
pixel goes to the right and to the bottom."""

NOMINAL_SIDE = 14
"""Height or width where that is symbolic: a comparison of it would bind the exported program to one range of sizes."""


class ConvArguments(NamedTuple):
    """What ``F.conv2d(x, weight, bias, *arguments)`` takes, for an input that is padded where ``F.conv2d`` cannot."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


@dataclass(frozen=True)
class ConvGeometry:
    """The arguments of a convolution, with the meanings and defaults of ``nn.Conv2d``.

    padding: ``"tf_same"`` (``TF_SAME``) is allowed too, with any stride; and four numbers, pixels on the left, right,
        top and bottom.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | tuple[int, int, int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def make(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | tuple[int, int, int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> ConvGeometry:
        """A geometry from the arguments of ``nn.Conv2d``. Raises ``InputError`` where ``nn.Conv2d`` raises."""
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise InputError(
                f"groups={groups} with {in_channels} input and {out_channels} output channels.",
                "groups must be at least 1 and divide both.",
                "groups=1",
            )
        if padding_mode not in PADDING_MODES:
            raise InputError(f"padding_mode is {padding_mode!r}.", f"It must be one of: {', '.join(PADDING_MODES)}.")
        if isinstance(padding, str):
            _check_padding(padding, stride, padding_mode)
        return cls(
            in_channels,
            out_channels,
            _pair(kernel_size),
            _pair(stride),
            padding if isinstance(padding, str) else _pair(padding),  # type: ignore[arg-type]  # four stay four
            _pair(dilation),
            groups,
            padding_mode,
        )

    @property
    def by_side(self) -> bool:
        """The padding is given for each side."""
        return not isinstance(self.padding, str) and len(self.padding) == 4

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """``(O, I/G, kh, kw)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_numel(self) -> int:
        """``|W|``: elements of one kernel."""
        o, i, kh, kw = self.weight_shape
        return o * i * kh * kw

    @property
    def pointwise(self) -> bool:
        """The kernel is 1x1."""
        return self.kernel_size == (1, 1)

    @property
    def depthwise(self) -> bool:
        """One filter for each channel, as many out as in."""
        return self.groups == self.in_channels == self.out_channels

    def pad_amounts(self, x: Tensor) -> tuple[int, int, int, int]:
        """The padding of ``x`` [B, I, H, W] in pixels, as ``F.pad`` takes it: left, right, top, bottom."""
        if not isinstance(self.padding, str):
            if len(self.padding) == 4:
                return self.padding
            ph, pw = self.padding
            return (pw, pw, ph, ph)
        if self.padding == "valid":
            return (0, 0, 0, 0)
        tall, wide = (self._total_padding(x, d) for d in range(2))
        return (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)

    def _total_padding(self, x: Tensor, d: int) -> int:
        """Both sides together, for 'same' and ``TF_SAME``, in dimension ``d`` of the kernel."""
        reach = self.dilation[d] * (self.kernel_size[d] - 1)
        if self.padding == "same":
            return reach
        size, stride = x.shape[2 + d], self.stride[d]
        last = (-(-size // stride) - 1) * stride  # input pixel at which the last position starts
        return torch.sym_max(last + reach + 1 - size, 0)  # type: ignore[return-value]

    def positions(self, x: Tensor) -> int:
        """Output positions of ``x`` [B, I, H, W], approximately: padding is not counted."""
        height, width = known_sides(x)
        return (height // self.stride[0]) * (width // self.stride[1])

    def activations(self, x: Tensor) -> int:
        """Elements of the input and the output of one sample of ``x`` [B, I, H, W], approximately."""
        height, width = known_sides(x)
        return self.in_channels * height * width + self.out_channels * self.positions(x)

    def pad(self, x: Tensor) -> tuple[Tensor, ConvArguments]:
        """``x`` [B, I, H, W], padded where ``F.conv2d`` cannot do it, and the arguments left for ``F.conv2d``."""
        if not isinstance(self.padding, str) and len(self.padding) == 2 and self.padding_mode == "zeros":
            return x, ConvArguments(self.stride, self.padding, self.dilation, self.groups)
        amounts = left, right, top, bottom = self.pad_amounts(x)
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return x, ConvArguments(self.stride, (top, left), self.dilation, self.groups)
        if left or right or top or bottom:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, amounts, mode=mode)
        return x, ConvArguments(self.stride, (0, 0), self.dilation, self.groups)


def known_sides(x: Tensor) -> tuple[int, int]:
    """Height and width of ``x`` [B, I, H, W]; ``NOMINAL_SIDE`` for one that is symbolic."""
    height, width = x.shape[2], x.shape[3]
    return height if isinstance(height, int) else NOMINAL_SIDE, width if isinstance(width, int) else NOMINAL_SIDE


def _check_padding(padding: str, stride: int | tuple[int, int], padding_mode: str) -> None:
    if padding not in ("same", "valid", TF_SAME):
        allowed = f"A string must be 'same', 'valid' or {TF_SAME!r}."
        raise InputError(f"padding is {padding!r}.", allowed, "padding='same'")
    if padding == TF_SAME and padding_mode != "zeros":
        given = f"padding={TF_SAME!r} with padding_mode={padding_mode!r}."
        raise InputError(given, "TensorFlow pads with zeros.", "padding_mode='zeros'")
    if padding == "same" and _pair(stride) != (1, 1):
        raise InputError(f"padding='same' with stride {stride}.", "'same' needs stride 1.", "padding=1")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return tuple(value) if isinstance(value, Iterable) else (value, value)  # type: ignore[return-value]
