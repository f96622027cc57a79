"""Large JPEGs are decoded at a half, a quarter or an eighth where the transform would shrink them further anyway."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condconv_surgery.data.data_check import check_data
from condconv_surgery.data.decode_image import read_image
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import AugmentOptions
from condconv_surgery.training.batches.augmentation import least_side
from tests.images import write_images

SPEC = InputSpec(height=64, width=64, crop_fraction=1.0)


def photo(path: Path, size: tuple[int, int], orientation: int = 1, mode: str = "RGB") -> Path:
    """Smooth shapes and fine noise, as a camera's file has."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 12, (size[1], size[0], 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, quality=92, exif=exif)
    return path


@pytest.mark.parametrize(
    ("size", "least", "decoded"),
    [
        ((1024, 768), 128, (256, 192)),  # 768 / 4 is at least 128, 768 / 8 is not
        ((1024, 768), 96, (128, 96)),
        ((1024, 768), 400, (1024, 768)),
        ((1024, 768), 0, (1024, 768)),
        ((1021, 767), 191, (256, 192)),
        ((100, 4000), 50, (50, 2000)),
    ],
)
def test_the_shorter_side_keeps_the_least_pixels(
    tmp_path: Path, size: tuple[int, int], least: int, decoded: tuple[int, int]
) -> None:
    assert read_image(photo(tmp_path / "a.jpg", size), least=least).size == decoded


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    Image.new("RGB", (512, 512)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", least=64).size == (512, 512)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_input_of_the_network_is_the_same_up_to_rounding(
    tmp_path: Path, mode: str, orientation: int, channels: int
) -> None:
    """Mean difference below one of 255 levels, at eight times fewer pixels a side."""
    path = photo(tmp_path / "a.jpg", (1600, 1200), orientation, mode)
    mean, std = (0.0,) * channels, (1.0,) * channels
    transform = EvaluationTransform(InputSpec(channels, 64, 64, crop_fraction=1.0, mean=mean, std=std))
    whole, reduced = read_image(path, channels), read_image(path, channels, transform.least)
    assert reduced.size == tuple(side // 8 for side in whole.size)
    difference = (transform(whole) - transform(reduced)).abs() * 255
    assert difference.mean() < 1
    assert difference.max() < 8


def test_no_training_crop_is_enlarged() -> None:
    for crop in ((0.35, 1.0), (0.08, 1.0), (1.0, 1.0), (0.01, 0.02)):
        options = AugmentOptions(crop=crop)
        smallest = least_side(SPEC, options) * (crop[0] * 3 / 4) ** 0.5  # the shorter side of the narrowest crop
        assert smallest >= SPEC.height
    assert least_side(SPEC, AugmentOptions(crop=(1.0, 1.0))) == 2 * SPEC.height == EvaluationTransform(SPEC).least


def test_the_check_reports_the_size_of_the_file(tmp_path: Path) -> None:
    folder = write_images(tmp_path, classes=2, each=3)
    photo(folder / "class0/large.jpg", (1600, 1200), orientation=6)
    assert check_data(str(folder)).sizes[-1] == (1200, 1600)


def test_a_photo_in_another_quality_is_a_duplicate(tmp_path: Path) -> None:
    """Also where one is decoded smaller than the other."""
    train, val = (write_images(tmp_path / part, classes=2, each=3) for part in ("train", "val"))
    photo(train / "class0/large.jpg", (2400, 1800))
    with Image.open(train / "class0/large.jpg") as image:
        image.resize((1200, 900)).save(val / "class0/small.jpg", quality=70)
    for path in val.rglob("0*.png"):  # others than in train
        pixels = np.random.default_rng(int(path.stem)).integers(0, 255, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    found = check_data(str(tmp_path))
    assert (found.equal, found.near) == (0, 1)


def test_a_stream_of_bytes_is_reduced_too(tmp_path: Path) -> None:
    from condconv_surgery.data.decode_image import decode_image

    content = photo(tmp_path / "a.jpg", (1024, 768)).read_bytes()
    image = decode_image(lambda: Image.open(io.BytesIO(content)), least=96)
    assert torch.tensor(image.size).tolist() == [128, 96]
