"""The evaluation transform against those of torchvision and timm, which we did not write."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from condconv_surgery.errors import InputError
from condconv_surgery.models.preprocess import EvaluationTransform, to_channels
from condconv_surgery.recipe import InputSpec

SIZES = [(300, 200), (200, 300), (64, 64), (97, 411)]


def image(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype="uint8")).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("crop", "resize"), [(224, 256), (224, 232), (299, 342), (64, 64)])
def test_equals_torchvision(size: tuple[int, int], crop: int, resize: int) -> None:
    theirs = ImageClassification(crop_size=crop, resize_size=resize, interpolation=InterpolationMode.BICUBIC)
    spec = InputSpec(height=crop, width=crop, interpolation="bicubic", crop_fraction=crop / resize)
    torch.testing.assert_close(EvaluationTransform(spec)(image(size)), theirs(image(size)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fraction", [0.9, 0.875, 0.95, 1.0])
def test_equals_timm(size: tuple[int, int], fraction: float) -> None:
    data = pytest.importorskip("timm.data")
    theirs = data.create_transform((3, 224, 224), interpolation="bilinear", crop_pct=fraction, is_training=False)
    spec = InputSpec(crop_fraction=fraction)
    torch.testing.assert_close(EvaluationTransform(spec)(image(size)), theirs(image(size)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_a_wide_input_is_covered(size: tuple[int, int]) -> None:
    spec = InputSpec(height=48, width=96, mean=(0.0,) * 3, std=(1.0,) * 3)
    white = Image.new("RGB", size, (255, 255, 255))
    out = EvaluationTransform(spec)(white)
    assert out.shape == (3, 48, 96)
    assert bool((out == 1).all()), "no padding is visible"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_has_the_channels_of_the_model(mode: str, channels: int) -> None:
    spec = InputSpec(channels, 32, 32, (0.5,) * channels, (0.5,) * channels)
    assert EvaluationTransform(spec)(image((40, 30), mode)).shape == (channels, 32, 32)


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette: Any = Image.new("P", (8, 8), 3)
    palette.info["transparency"] = 3
    for transparent in (clear, palette):
        assert to_channels(transparent).getpixel((0, 0)) == (255, 255, 255)


def test_survives_a_trip_to_a_loader_process() -> None:
    transform = EvaluationTransform(InputSpec(height=32, width=32))
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image((40, 30))), transform(image((40, 30))))


def test_no_image_file_has_four_channels() -> None:
    with pytest.raises(InputError, match="takes images of 4 channels"):
        EvaluationTransform(InputSpec(4, 32, 32, mean=(0.5,) * 4, std=(0.5,) * 4))
