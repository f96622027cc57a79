"""A sweep over image kinds: mode x bit depth x container x orientation x name x place, each with its accuracy.

The class is the bright half of the image, and the network compares the halves. It is right on every image that is read
as a viewer shows it; clipped values, a turned image or a wrong class make it wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor, nn

from condconv_surgery.data.data_check import check_data
from condconv_surgery.data.evaluation_images import find_evaluation_images
from condconv_surgery.data.image_dataset import Draw, ImageDataset, collate
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.training import evaluate

CLASSES = ("down", "left", "right", "up")
SIDE, EACH = 32, 2
SPEC = InputSpec(height=SIDE, width=SIDE, crop_fraction=1.0)


class Halves(nn.Module):
    """The mean of the half that each class is named after."""

    def forward(self, x: Tensor) -> Tensor:
        middle, grey = SIDE // 2, x.mean(1)
        halves = (grey[:, middle:], grey[:, :, :middle], grey[:, :, middle:], grey[:, :middle])
        return torch.stack([half.mean((1, 2)) for half in halves], dim=1)


def pixels(name: str, number: int) -> np.ndarray:
    """Grey [SIDE, SIDE] of 8 bits: dark, and bright in one half."""
    rng = np.random.default_rng([CLASSES.index(name), number])
    grey = rng.integers(10, 60, (SIDE, SIDE)).astype(np.uint8)
    half = {"down": np.s_[16:], "left": np.s_[:, :16], "right": np.s_[:, 16:], "up": np.s_[:16]}[name]
    grey[half] += 150
    return grey


def in_mode(grey: np.ndarray, mode: str) -> Image.Image:
    """The image in one of PIL's modes; 16 bits and floats hold the same picture."""
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "I;16B":
        return Image.frombytes("I;16B", grey.shape[::-1], (grey.astype(">u2") * 257).tobytes())
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    return Image.fromarray(grey).convert(mode)


def write(
    folder: Path, file: str, mode: str = "RGB", turn: Callable[[np.ndarray], np.ndarray] = lambda a: a, **how: object
) -> None:
    """``EACH`` images of each class. file: a name with ``{}`` for the number, and the suffix."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(EACH):
            image = in_mode(np.ascontiguousarray(turn(pixels(name, number))), mode)
            image.save(folder / name / file.format(number), **how)  # type: ignore[arg-type]


def accuracy(folder: Path | str, channels: int = 3, **data: object) -> float:
    """Top-1 over all images that are found, which must be all that were written."""
    images = find_evaluation_images(DataOptions(folder=str(folder), **data)).images  # type: ignore[arg-type]
    transform = EvaluationTransform(InputSpec(channels, SIDE, SIDE, crop_fraction=1.0))
    dataset = ImageDataset(images, transform, channels=channels, least=transform.least)
    batch = collate([dataset[Draw(0, index)] for index in range(len(images))])
    assert (batch.unreadable, len(batch.labels)) == ((), EACH * len(CLASSES))
    tally = evaluate(Halves(), [batch])
    assert tally is not None
    return tally.top1


KINDS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B"),
    "bmp": ("1", "L", "P", "RGB"),
    "gif": ("L", "P", "RGB"),
    "webp": ("L", "RGB", "RGBA"),
    "avif": ("RGB", "RGBA"),
    "ppm": ("RGB",),
    "pgm": ("L", "I;16"),
    "pbm": ("1",),
    "jp2": ("L", "RGB", "RGBA", "I;16"),
    "tga": ("L", "RGB", "RGBA"),
    "pcx": ("L", "P", "RGB"),
}


@pytest.mark.parametrize(
    ("container", "mode"), [(container, mode) for container, modes in KINDS.items() for mode in modes]
)
def test_modes_and_depths_in_each_container(tmp_path: Path, container: str, mode: str) -> None:
    write(tmp_path, f"{{}}.{container}", mode)
    assert accuracy(tmp_path) == 1.0
    assert accuracy(tmp_path, channels=1) == 1.0


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, 3),
}


@pytest.mark.parametrize(("suffix", "mode"), [("jpg", "RGB"), ("png", "I;16"), ("tif", "L")])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientations(tmp_path: Path, orientation: int, suffix: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path, f"{{}}.{suffix}", mode, TURNS[orientation], exif=exif)
    assert accuracy(tmp_path) == 1.0


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("{}.PNG", "PNG"),
        ("{}.JPEG", "JPEG"),
        ("{}.jfif", "JPEG"),
        ("{}.jpe", "JPEG"),
        ("{}", "PNG"),
        ("{}.png", "JPEG"),
        ("{}.dat", "TIFF"),
        ("a b {}.png", "PNG"),
        ("été {}.jpg", "JPEG"),
        ("画像{}.webp", "WEBP"),
        ("{}.tar.gz.png", "PNG"),
        (os.fsdecode(b"caf\xe9") + "{}.png", "PNG"),
        ("quo\"te's {}.png", "PNG"),
        ("line\nbreak{}.png", "PNG"),
    ],
)
def test_names(tmp_path: Path, file: str, kind: str) -> None:
    write(tmp_path, file, format=kind)
    assert accuracy(tmp_path) == 1.0
    assert all(line.isprintable() for line in check_data(str(tmp_path)).lines())


def _parts(root: Path, train: str, val: str) -> Path:
    write(root / train, "{}.png", "L")
    write(root / val, "{}.png")
    return root


def _nested(root: Path) -> Path:
    write(root / "flat", "{}.png")
    for name in CLASSES:
        (root / "flat" / name).rename(root / "flat" / "moved")
        (root / "data" / name / "deep" / "deeper").mkdir(parents=True)
        (root / "flat" / "moved").rename(root / "data" / name / "deep" / "deeper" / "here")
    return root / "data"


def _linked(root: Path) -> Path:
    write(root / "store", "{}.png")
    (root / "data").mkdir()
    for name in CLASSES:
        (root / "data" / name).symlink_to(root / "store" / name)
        (root / "store" / name / "up").symlink_to("..")
    return root / "data"


def _hidden(root: Path) -> Path:
    write(root, "{}.png")
    for name in (".ipynb_checkpoints", "__MACOSX", "up/.cache", "left/.ipynb_checkpoints"):
        write(root / name, "copy{}.png")
    (root / "up/._0.png").write_bytes(b"\0\5\26\7")
    return root


PLACES: dict[str, Callable[[Path], Path]] = {
    "Train, Val": lambda root: _parts(root, "Train", "Val"),
    "training, dev": lambda root: _parts(root, "training", "dev"),
    "train_set, val_set": lambda root: _parts(root, "train_set", "val_set"),
    "train, test": lambda root: _parts(root, "train", "Testing"),
    "nested": _nested,
    "linked": _linked,
    "hidden": _hidden,
}


@pytest.mark.parametrize("place", PLACES)
def test_places(tmp_path: Path, place: str) -> None:
    assert accuracy(PLACES[place](tmp_path)) == 1.0


def _replaced(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


SPOILT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": ("png", _replaced(b"")),
    "not an image of a known format": ("png", _replaced(b"<!DOCTYPE html>")),
    "truncated": ("png", lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "32-bit floats of unknown range": ("tif", lambda path: in_mode(pixels("up", 0), "F").save(path)),
    "32-bit or signed integers of unknown range": (
        "tif",
        lambda path: Image.fromarray(pixels("up", 0).astype(np.int32)).save(path),
    ),
    "more than 89 megapixels": ("png", lambda path: Image.new("1", (30000, 3600)).save(path)),
}


@pytest.mark.parametrize("reason", SPOILT)
def test_what_cannot_be_read_is_counted_by_its_reason(tmp_path: Path, reason: str) -> None:
    suffix, spoil = SPOILT[reason]
    write(tmp_path, f"{{}}.{suffix}")
    spoil(tmp_path / "up" / f"1.{suffix}")
    found = check_data(str(tmp_path))
    assert found.unreadable == {reason: 1}
    assert f"Unreadable: 1 {reason} ({tmp_path}/up/1.{suffix})" in found.lines()


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("notes.txt", "not an image (.txt)"),
        ("0001.nef", "camera raw (.nef)"),
        ("clip.mp4", "not an image (.mp4)"),
        (".hidden.png", "hidden"),
    ],
)
def test_what_is_skipped_is_counted_by_its_reason(tmp_path: Path, file: str, reason: str) -> None:
    write(tmp_path, "{}.png")
    (tmp_path / "up" / file).write_bytes(b"\0\0\0\x18ftypmp42")
    found = check_data(str(tmp_path))
    assert found.skipped == {reason: 1}
    assert accuracy(tmp_path) == 1.0


def test_floats_of_a_declared_range(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((340, 0.0), (341, 1.0)):
        tags.tagtype[tag] = 11
        tags[tag] = value
    write(tmp_path, "{}.tif", "F", tiffinfo=tags)
    assert accuracy(tmp_path) == 1.0


def test_ycbcr_in_a_tiff(tmp_path: Path) -> None:
    write(tmp_path, "{}.tif", "YCbCr")
    try:
        with Image.open(tmp_path / "up/0.tif") as image:
            image.load()
    except OSError:
        pytest.skip("this Pillow cannot read the file that it wrote")
    assert accuracy(tmp_path) == 1.0


def test_the_network_is_wrong_on_images_that_are_not_upright(tmp_path: Path) -> None:
    """So the sweep can fail."""
    write(tmp_path, "{}.png", "L", TURNS[3])
    assert accuracy(tmp_path) == 0.0
