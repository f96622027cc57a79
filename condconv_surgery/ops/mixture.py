"""What a router answers, and the geometry of the convolution it answers for.

The alphabet of shapes used throughout: B batch, E experts, I/O channels in/out, G groups, kh kw kernel, H W positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from condconv_surgery.errors import InputError
from condconv_surgery.ops.conv2d_subclasses import TF_SAME, padding_of

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Mixture(NamedTuple):
    """Which kernel each sample gets:  ``W_b = spatial_b * sum_e gate[b,e] * experts[e]``  and
    ``y_b = out_scale_b * conv(in_scale_b * x_b, W_b) + sum_e gate[b,e] * bias[e]``.

    ``None`` stands for all ones; a ``gate`` of ``None`` is only possible with one expert.
    """

    gate: Tensor | None = None  # [B, E]
    spatial: Tensor | None = None  # [B, kh, kw]
    in_scale: Tensor | None = None  # [B, I]
    out_scale: Tensor | None = None  # [B, O]


@dataclass(frozen=True)
class ConvGeometry:
    """Everything that fixes a convolution but its weights, with the meanings and defaults of ``nn.Conv2d``.

    padding: ``"tf_same"`` too, with any stride: ``ceil(H / stride)`` positions, margins by the size of the input.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
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
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> ConvGeometry:
        """A geometry from its fields as ``nn.Conv2d`` takes them, checked as ``nn.Conv2d`` checks them."""
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
            padding if isinstance(padding, str) else _pair(padding),
            _pair(dilation),
            groups,
            padding_mode,
        )

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> ConvGeometry:
        """The geometry of a convolution, or of a Linear seen as a 1x1 convolution."""
        if isinstance(module, nn.Linear):
            return cls.make(module.in_features, module.out_features, 1)
        return cls.make(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            padding_of(module),
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            module.padding_mode,
        )

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """``(O, I/G, kh, kw)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_numel(self) -> int:
        """``|W|``: the weights of one kernel."""
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

    def margins(self, x: Tensor) -> tuple[int, int, int, int]:
        """Padding of ``x`` [B, I, H, W] as ``F.pad`` takes it: left, right, top, bottom, in pixels."""
        if not isinstance(self.padding, str):
            ph, pw = self.padding
            return (pw, pw, ph, ph)
        if self.padding == "valid":
            return (0, 0, 0, 0)
        tall, wide = (self._total_margin(x, d) for d in range(2))
        return (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)

    def _total_margin(self, x: Tensor, d: int) -> int:
        """Of both sides together, for 'same' and ``TF_SAME``, in dimension ``d`` of the kernel."""
        reach = self.dilation[d] * (self.kernel_size[d] - 1)
        if self.padding == "same":
            return reach
        size, stride = x.shape[2 + d], self.stride[d]
        last = (-(-size // stride) - 1) * stride  # where the last position starts
        return torch.sym_max(last + reach + 1 - size, 0)  # type: ignore[return-value]

    def positions(self, x: Tensor) -> int:
        """Output positions of ``x`` [B, I, H, W], about: margins are not looked at."""
        return (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])

    def activations(self, x: Tensor) -> int:
        """Numbers in the input and the output of one sample of ``x`` [B, I, H, W], about."""
        return self.in_channels * x.shape[2] * x.shape[3] + self.out_channels * self.positions(x)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``x`` [B, I, H, W], padded where a convolution cannot do it, and the padding left for the convolution."""
        margins = left, right, top, bottom = self.margins(x)
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return x, (top, left)
        if left or right or top or bottom:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, margins, mode=mode)
        return x, (0, 0)


def _check_padding(padding: str, stride: int | tuple[int, int], padding_mode: str) -> None:
    if padding not in ("same", "valid", TF_SAME):
        allowed = f"A text must be 'same', 'valid' or {TF_SAME!r}."
        raise InputError(f"padding is {padding!r}.", allowed, "padding='same'")
    if padding == TF_SAME and padding_mode != "zeros":
        given = f"padding={TF_SAME!r} with padding_mode={padding_mode!r}."
        raise InputError(given, "TensorFlow pads with zeros.", "padding_mode='zeros'")
    if padding == "same" and _pair(stride) != (1, 1):
        raise InputError(f"padding='same' with stride {stride}.", "'same' needs stride 1.", "padding=1")
