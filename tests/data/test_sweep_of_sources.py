"""The sweep's image kinds in tar shards and in sets of the ``datasets`` library: accuracy as in a folder."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from condconv_surgery.data.data_check import check_data
from tests.data.test_data_sweep import CLASSES, EACH, TURNS, accuracy, write

KINDS = [
    ("png", "I;16", 1),
    ("png", "I;16", 8),
    ("png", "P", 1),
    ("jpg", "CMYK", 1),
    ("jpg", "CMYK", 3),
    ("jpg", "RGB", 6),
    ("jpg", "L", 5),
    ("tif", "L", 7),
    ("tif", "I;16B", 1),
    ("webp", "RGBA", 1),
    ("webp", "RGB", 8),
    ("avif", "RGB", 1),
    ("gif", "P", 1),
    ("bmp", "1", 1),
]
"""Container, mode, EXIF orientation."""


def shards_of(folder: Path) -> str:
    """Two shards; the labels are names."""
    files = sorted(folder.rglob("*.*"))
    for number in range(2):
        with tarfile.open(folder.parent / f"s-{number}.tar", "w") as tar:
            for index, path in list(enumerate(files))[number::2]:
                for suffix, content in ((path.suffix, path.read_bytes()), (".cls", path.parent.name.encode())):
                    member = tarfile.TarInfo(f"{index:03}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    return f"{folder.parent}/s-{{0..1}}.tar"


def saved_set_of(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    files = sorted(folder.rglob("*.*"))
    rows = {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(folder.parent / "saved"))
    return f"hf:{folder.parent}/saved"


@pytest.mark.parametrize("source_of", [shards_of, saved_set_of])
@pytest.mark.parametrize(("container", "mode", "orientation"), KINDS)
def test_kinds_in_each_source(
    tmp_path: Path, source_of: Callable[[Path], str], container: str, mode: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"exif": exif} if orientation > 1 else {}
    write(tmp_path / "folder", f"{{}}.{container}", mode, TURNS[orientation], **how)
    source = source_of(tmp_path / "folder")
    assert accuracy(source) == accuracy(tmp_path / "folder") == 1.0


@pytest.mark.parametrize("source_of", [shards_of, saved_set_of])
@pytest.mark.parametrize(
    ("reason", "content"), [("empty", b""), ("not an image of a known format", b"<!DOCTYPE html>")]
)
def test_what_cannot_be_read_in_each_source(
    tmp_path: Path, source_of: Callable[[Path], str], reason: str, content: bytes
) -> None:
    write(tmp_path / "folder", "{}.png")
    (tmp_path / "folder/up/1.png").write_bytes(content)
    found = check_data(source_of(tmp_path / "folder"))
    assert (found.train + found.val, found.unreadable) == (EACH * len(CLASSES), {reason: 1})
