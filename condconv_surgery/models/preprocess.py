"""The evaluation transform: from an image to a model's input tensor. No randomness, the same in every command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from condconv_surgery.errors import InputError
from condconv_surgery.models.eight_bits import to_eight_bits, upright
from condconv_surgery.recipe import InputSpec

REDUCING_GAP = 2
"""How much larger than the resized image a decoded one must be at least (as PIL's ``thumbnail``)."""


@dataclass(frozen=True)
class EvaluationTransform:
    """PIL image of any size and mode -> normalised float32 tensor [C, H, W]; it can be pickled into loader processes.

    The image is resized until it just covers ``(height, width) / crop_fraction`` and cropped at its centre, values are
    scaled to [0, 1], then ``(value - mean) / std``. For a square input this is torchvision's ``ImageClassification``
    preset and timm's evaluation transform, up to the last bits of float32. Raises ``InputError`` for other channels
    than one and three, which no image file has.
    """

    spec: InputSpec

    def __post_init__(self) -> None:
        if self.spec.channels not in (1, 3):
            raise InputError(
                f"The model takes images of {self.spec.channels} channels.",
                "Image files are read in RGB, or in grey for one channel.",
                "your own loop with the functions of condconv_surgery.training",
            )

    @property
    def least(self) -> int:
        """Pixels of an image's shorter side from which on a larger one would not look different: twice the resized."""
        spec = self.spec
        return REDUCING_GAP * _enlarged(max(spec.height, spec.width), spec.crop_fraction)

    def __call__(self, image: Image.Image) -> Tensor:
        spec = self.spec
        image = to_channels(image, spec.channels)
        resized = tv.resize(
            image, self._covering(image), interpolation=InterpolationMode(spec.interpolation), antialias=True
        )
        return normalised(tv.center_crop(resized, [spec.height, spec.width]), spec)

    def _covering(self, image: Image.Image) -> list[int]:
        """``[height, width]`` of the resized image, or ``[side]`` of its shorter side where that is equivalent."""
        spec = self.spec
        tall, wide = _enlarged(spec.height, spec.crop_fraction), _enlarged(spec.width, spec.crop_fraction)
        if tall == wide:
            return [tall]
        scale = max(tall / image.height, wide / image.width)
        return [max(tall, round(image.height * scale)), max(wide, round(image.width * scale))]


def normalised(image: Image.Image, spec: InputSpec) -> Tensor:
    """``(value - mean) / std`` by channel of values in [0, 1]: an image of 8 bits -> float32 [C, H, W]."""
    # PIL's layout is [H, W, C], in which a normalisation by channel takes three times as long
    pixels = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True).contiguous()
    return cast(Tensor, tv.normalize(pixels, list(spec.mean), list(spec.std), inplace=True))


def to_channels(image: Image.Image, channels: int = 3) -> Image.Image:
    """``image`` upright, in 8 bits, in RGB or in grey for one channel, transparency composited on white.

    (The stored colour of a transparent pixel is arbitrary.) Raises ``UnknownRangeError`` for floats without a range.
    """
    mode = "L" if channels == 1 else "RGB"
    if type(image) is Image.Image and image.mode == mode and not image.info.keys() & {"transparency", "exif"}:
        return image  # in memory, as this function made it
    image = upright(to_eight_bits(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert(mode)
    return image if image.mode == mode else image.convert(mode)  # to the same mode it would copy


def _enlarged(side: int, fraction: float) -> int:
    """Rounded as in timm; the small term cancels the rounding error of a fraction such as 224/232."""
    return math.floor(side / fraction + 1e-6)
