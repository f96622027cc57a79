"""From a picture to the tensor that a model was trained to see: no randomness, the same in every command."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from condconv_surgery.recipe import InputSpec


@dataclass(frozen=True)
class EvaluationTransform:
    """PIL picture of any size and mode -> normalised float32 tensor [C, H, W].

    The picture is resized until it just covers ``(height, width) / crop_fraction``, its middle is cropped, values are
    scaled to [0, 1], then ``(value - mean) / std``. For a square input this is torchvision's ``ImageClassification``
    preset and timm's evaluation transform, up to the last bits of float32.
    """

    spec: InputSpec

    def __call__(self, picture: Image.Image) -> Tensor:
        spec = self.spec
        picture = flat(picture, spec.channels)
        resized = tv.resize(
            picture, self._covering(picture), interpolation=InterpolationMode(spec.interpolation), antialias=True
        )
        cropped = tv.center_crop(resized, [spec.height, spec.width])
        pixels = tv.to_dtype(tv.pil_to_tensor(cropped), torch.float32, scale=True)
        normalised: Tensor = tv.normalize(pixels, list(spec.mean), list(spec.std))
        return normalised

    def _covering(self, picture: Image.Image) -> list[int]:
        """``[height, width]`` of the resized picture, or ``[side]`` of its shorter side where that says the same."""
        spec = self.spec
        tall, wide = _enlarged(spec.height, spec.crop_fraction), _enlarged(spec.width, spec.crop_fraction)
        if tall == wide:
            return [tall]
        scale = max(tall / picture.height, wide / picture.width)
        return [max(tall, round(picture.height * scale)), max(wide, round(picture.width * scale))]


def evaluation_transform(spec: InputSpec) -> EvaluationTransform:
    """The transform for pictures of a model with this input; it can be pickled into loader processes."""
    return EvaluationTransform(spec)


def flat(picture: Image.Image, channels: int = 3) -> Image.Image:
    """``picture`` in RGB, or in grey for one channel, transparency laid on white.

    A transparent pixel has a colour of its own, which nobody meant to be seen.
    """
    mode = "L" if channels == 1 else "RGB"
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert(mode)
    return picture.convert(mode)


def _enlarged(side: int, fraction: float) -> int:
    """As timm rounds; the small term undoes the error of a fraction that was itself computed, 224/232."""
    return math.floor(side / fraction + 1e-6)
