"""Every kind of image shows what a viewer shows: the same picture in each mode, depth, container and orientation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from condconv_surgery.data.decode_image import UnreadableImageError, read_image
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec

GREY = np.linspace(0, 255, 12 * 20).reshape(12, 20).round().astype(np.uint8)  # no side, no corner like another


def grey_of(path: Path, channels: int = 3) -> np.ndarray:
    """The image as it is read, in grey."""
    return np.asarray(read_image(path, channels).convert("L")).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "deep.jp2"])
def test_sixteen_bits_are_scaled(tmp_path: Path, name: str, channels: int) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(
        tmp_path / name, **({"irreversible": False} if "jp2" in name else {})
    )
    assert np.abs(grey_of(tmp_path / name, channels) - GREY).max() <= 1


def test_big_endian_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    raw = (GREY.astype(">u2") * 257).tobytes()
    Image.frombytes("I;16B", (20, 12), raw).save(tmp_path / "big.tif")
    assert (grey_of(tmp_path / "big.tif") == GREY).all()


def test_sixteen_bits_in_which_white_is_zero(tmp_path: Path) -> None:
    deep = Image.fromarray((255 - GREY).astype(np.uint16) * 257)
    deep.save(tmp_path / "a.tif")
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    entry = raw.index(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # the tag 262, one short
    raw[entry + 8] = 0
    (tmp_path / "a.tif").write_bytes(raw)
    assert (grey_of(tmp_path / "a.tif") == GREY).all()


def test_colours_of_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "deep.ppm").write_bytes(b"P6 20 12 65535\n" + np.repeat(GREY.astype(">u2") * 257, 3).tobytes())
    assert np.abs(grey_of(tmp_path / "deep.ppm") - GREY).max() <= 1


def test_a_transparent_value_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    deep.save(tmp_path / "a.png", transparency=0)
    found = grey_of(tmp_path / "a.png")
    assert found[0, 0] == 255
    assert (found[1:] == GREY[1:]).all()


def test_floats_are_scaled_by_their_declared_range_only(tmp_path: Path) -> None:
    image = Image.fromarray(GREY.astype(np.float32) / 255)
    image.save(tmp_path / "unknown.tif")
    with pytest.raises(UnreadableImageError, match="32-bit floats of unknown range") as caught:
        read_image(tmp_path / "unknown.tif")
    assert "8 or 16 bits" in caught.value.fix
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((340, 0.0), (341, 1.0)):
        tags.tagtype[tag] = 11
        tags[tag] = value
    image.save(tmp_path / "known.tif", tiffinfo=tags)
    assert (grey_of(tmp_path / "known.tif") == GREY).all()


def test_integers_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match="integers of unknown range"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.T),
        (6, lambda a: np.rot90(a)),
        (7, lambda a: a[::-1, ::-1].T),
        (8, lambda a: np.rot90(a, 3)),
    ],
)
def test_images_are_upright(tmp_path: Path, name: str, orientation: int, stored: object) -> None:
    large = np.kron(GREY, np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored(large))).save(tmp_path / name, exif=exif, quality=95)  # type: ignore[operator]
    found = grey_of(tmp_path / name)
    assert found.shape == large.shape
    assert np.abs(found - large).mean() < 3


def test_the_evaluation_transform_shows_the_same(tmp_path: Path) -> None:
    transform = EvaluationTransform(InputSpec(height=12, width=12, crop_fraction=1.0))
    exif = Image.Exif()
    exif[0x0112] = 3
    square = GREY[:, :12]
    Image.fromarray(np.ascontiguousarray(square[::-1, ::-1]).astype(np.uint16) * 257).save(
        tmp_path / "a.png", exif=exif
    )
    with Image.open(tmp_path / "a.png") as image:
        found = transform(image)
    assert torch.equal(found, transform(Image.fromarray(square)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"])
def test_other_modes_show_the_same(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.kron(GREY, np.ones((4, 4), np.uint8)))
    name = {"CMYK": "a.tif", "YCbCr": "a.tif", "RGBX": "a.tif", "PA": "a.tif"}.get(mode, "a.png")
    converted = image.convert("L").convert("LA").convert(mode) if mode == "PA" else image.convert(mode)
    (converted.convert("LA") if mode == "PA" else converted).save(tmp_path / name)
    _skip_where_pillow_cannot_read(tmp_path / name)
    expected = np.asarray(converted.convert("RGB").convert("L")).astype(int)
    assert np.abs(grey_of(tmp_path / name) - expected).max() <= 2


def _skip_where_pillow_cannot_read(path: Path) -> None:
    """The oldest Pillow takes its own YCbCr TIFF for truncated."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        pytest.skip("this Pillow cannot read the file that it wrote")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(b"<html>"), "not an image of a known format"),
        (lambda p: p.write_bytes(p.read_bytes()[:-60]), "truncated"),
        (lambda p: p.unlink(), "missing"),
        (lambda p: Image.new("1", (30000, 3600)).save(p), "more than 89 megapixels"),
    ],
)
def test_an_unreadable_image_says_why(tmp_path: Path, spoil: object, reason: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        read_image(path)
    assert caught.value.reason == reason
    assert "remove" not in caught.value.fix or "megapixels" not in reason


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UnreadableImageError, match="no permission"):
        read_image(tmp_path / "a.png")
