"""WebDataset shards: tar files in which the files of one image have the same name and different extensions.

    00017.png  00017.cls          the label: a class number, or a class name
    00018.jpg  00018.json         {"label": 3}

The headers of each shard are read once; after that each image is read at its offset in the file. So images are
shuffled one by one over all shards, divided between processes and resumed like those of a folder.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.errors import InputError

LAYOUT = "A shard holds pairs: NAME.png (or .jpg, .webp) and NAME.cls (or NAME.json with a label)."


class ShardEntry(NamedTuple):
    """The position of a file in a shard."""

    shard: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with Path(self.shard).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class ShardImages(LabelledImages):
    """Labelled images in tar files."""

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    entries: tuple[ShardEntry, ...]

    def name(self, index: int) -> str:
        return f"{self.entries[index].shard}/{self.entries[index].name}"

    def key(self, index: int) -> str:
        return f"{Path(self.entries[index].shard).name}/{self.entries[index].name}"

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.entries[index].read()))

    def subset(self, indices: Sequence[int]) -> ShardImages:
        return replace(
            self, labels=tuple(self.labels[i] for i in indices), entries=tuple(self.entries[i] for i in indices)
        )


def scan_shards(pattern: str) -> ShardImages:
    """The images in all shards of a pattern: ``train-{000..127}.tar``, ``shards/*.tar``, one file.

    Class names are those in ``classes.txt`` beside the shards (one per line), else the numbers or the names in the
    ``.cls`` files. Raises ``InputError`` for shards that are missing, compressed or hold something else.
    """
    paths = find_shards(pattern)
    pairs = [pair for path in paths for pair in _pairs(path)]
    if not pairs:
        raise InputError(f"{pattern} has no labelled images.", LAYOUT, 'data="train-{000..007}.tar"')
    entries, raw = zip(*pairs, strict=True)
    classes = _class_names(raw, paths[0].with_name("classes.txt"))
    numbers = {name: number for number, name in enumerate(classes)}
    return ShardImages(
        classes, tuple(label if isinstance(label, int) else numbers[label] for label in raw), tuple(entries)
    )


def find_shards(pattern: str) -> list[Path]:
    """The files that match a pattern, in order. Raises ``InputError`` when one is missing, remote or compressed."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(
            f"{pattern} is not on this machine.",
            "Shards are read from a file system, each image at its offset.",
            'download or mount them, then data="FOLDER/SHARDS.tar"',
        )
    paths: list[Path] = []
    for name in expand_braces(pattern):
        found = sorted(glob.glob(name)) if re.search(r"[*?\[]", name) else [name]  # noqa: PTH207  # absolute ones too
        missing = not found or not Path(found[0]).is_file()
        if missing or not name.endswith(".tar"):
            raise InputError(
                f"There is no {name}." if missing else f"{name} is not a .tar file.",
                "A pattern names plain tar files: a glob, or braces such as {000..127} and {a,b}.",
                'data="train-{000..127}.tar"' if missing else "gunzip it: images are read at their offsets",
            )
        paths += map(Path, found)
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Brace expansion as in a shell: ``{000..127}`` and ``{a,b}``.

    >>> expand_braces("a-{08..10}{x,y}.tar")[:3]
    ['a-08x.tar', 'a-08y.tar', 'a-09x.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for position, piece in enumerate(pieces):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if position % 2 == 0:
            choices.append([piece])
        elif numbers:
            first, last = int(numbers[1]), int(numbers[2])
            width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
            choices.append([f"{n:0{width}}" for n in range(first, last + 1)])
        else:
            choices.append(piece.split(","))
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _pairs(path: Path) -> list[tuple[ShardEntry, int | str]]:
    """Each image of a shard with its label as it is written."""
    images: dict[str, ShardEntry] = {}
    labels: dict[str, int | str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key, entry = f"{folder}/{stem}", ShardEntry(str(path), member.name, member.offset_data, member.size)
                if f".{ending.lower()}" in IMG_EXTENSIONS:
                    images[key] = entry
                elif ending in ("cls", "json"):
                    labels[key] = _label(entry, ending)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is not a complete tar file: {error}.", LAYOUT, "write the shard again") from error
    unlabelled = next((key for key in images if key not in labels), None)
    if unlabelled is not None:
        raise InputError(f"{path} has no label for {images[unlabelled].name}.", LAYOUT, "write the shard again")
    return [(entry, labels[key]) for key, entry in images.items()]


def _label(entry: ShardEntry, ending: str) -> int | str:
    text = entry.read().decode("utf-8", "replace").strip()
    value: object = text
    if ending == "json":
        try:
            value = json.loads(text)["label"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{entry.shard}: {entry.name} has no label.", LAYOUT, '{"label": 3}') from error
    elif re.fullmatch(r"\d+", text):
        value = int(text)
    if isinstance(value, str) and value:
        return value
    if type(value) is int and value >= 0:
        return value
    kind = "many labels" if isinstance(value, list) else f"the label {value!r}"
    raise InputError(
        f"{entry.shard}: {entry.name} has {kind}.",
        "finetune trains classifiers: each image has one class, a whole number from 0 or a name.",
        "your own loop with the functions of condconv_surgery.training",
    )


def _class_names(labels: Sequence[int | str], names: Path) -> tuple[str, ...]:
    texts = sorted({label for label in labels if isinstance(label, str)})
    numbers = {label for label in labels if isinstance(label, int)}
    if texts and numbers:
        raise InputError(
            f"Some labels are numbers and some are names: {min(numbers)}, {texts[0]}.", LAYOUT, "use one kind for all"
        )
    if texts:
        return tuple(texts)
    if not names.is_file():
        return tuple(str(number) for number in range(max(numbers) + 1))
    lines = tuple(line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
    if max(numbers) >= len(lines):
        raise InputError(
            f"{names} has {len(lines)} names, but there is a label {max(numbers)}.",
            "A name for each class.",
            "add them",
        )
    return lines
