"""WebDataset shards: tar files in which the files of one image share a name and differ in their endings.

    00017.png  00017.cls          the label: a class number, or a class name
    00018.jpg  00018.json         {"label": 3}

The headers of each shard are read once; after that every image is read from its place in the file. So images are
shuffled one by one over all shards, and shared over processes and resumed like those of a folder.
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


class Place(NamedTuple):
    """A file within a shard."""

    shard: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content."""
        with Path(self.shard).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class ShardImages(LabelledImages):
    """Labelled images in tar files."""

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    places: tuple[Place, ...]

    def name(self, index: int) -> str:
        return f"{self.places[index].shard}/{self.places[index].name}"

    def key(self, index: int) -> str:
        return f"{Path(self.places[index].shard).name}/{self.places[index].name}"

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.places[index].read()))

    def subset(self, indices: Sequence[int]) -> ShardImages:
        return replace(
            self, labels=tuple(self.labels[i] for i in indices), places=tuple(self.places[i] for i in indices)
        )


def scan_shards(pattern: str) -> ShardImages:
    """The images in all shards of a pattern: ``train-{000..127}.tar``, ``shards/*.tar``, one file.

    Classes are called as ``classes.txt`` beside the shards says (a name per line), else by their numbers or by the
    names in the ``.cls`` files. Raises ``InputError`` for shards that are missing, compressed or hold something else.
    """
    paths = find_shards(pattern)
    pairs = [pair for path in paths for pair in _pairs(path)]
    if not pairs:
        raise InputError(f"{pattern} has no labelled images.", LAYOUT, "--data 'train-{000..007}.tar'")
    places, raw = zip(*pairs, strict=True)
    classes = _class_names(raw, paths[0].with_name("classes.txt"))
    numbers = {name: number for number, name in enumerate(classes)}
    return ShardImages(
        classes, tuple(label if isinstance(label, int) else numbers[label] for label in raw), tuple(places)
    )


def find_shards(pattern: str) -> list[Path]:
    """The files that a pattern names, in order. Raises ``InputError`` when one is missing, remote or compressed."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(
            f"{pattern} is not on this machine.",
            "Shards are read from a file system, each image at its place.",
            "download or mount them, then --data FOLDER/SHARDS.tar",
        )
    paths: list[Path] = []
    for name in expand_braces(pattern):
        found = sorted(glob.glob(name)) if re.search(r"[*?\[]", name) else [name]  # noqa: PTH207  # absolute ones too
        missing = not found or not Path(found[0]).is_file()
        if missing or not name.endswith(".tar"):
            raise InputError(
                f"There is no {name}." if missing else f"{name} is not a .tar file.",
                "A pattern names plain tar files: a glob, or braces such as {000..127} and {a,b}.",
                "--data 'train-{000..127}.tar'" if missing else "gunzip it, for a image is read at its place",
            )
        paths += map(Path, found)
    return paths


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of ``{000..127}`` and ``{a,b}``.

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


def _pairs(path: Path) -> list[tuple[Place, int | str]]:
    """Each image of a shard with its label as written."""
    images: dict[str, Place] = {}
    labels: dict[str, int | str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key, place = f"{folder}/{stem}", Place(str(path), member.name, member.offset_data, member.size)
                if f".{ending.lower()}" in IMG_EXTENSIONS:
                    images[key] = place
                elif ending in ("cls", "json"):
                    labels[key] = _label(place, ending)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is no whole tar file: {error}.", LAYOUT, "write the shard anew") from error
    lonely = next((key for key in images if key not in labels), None)
    if lonely is not None:
        raise InputError(f"{path} has no label for {images[lonely].name}.", LAYOUT, "write the shard anew")
    return [(place, labels[key]) for key, place in images.items()]


def _label(place: Place, ending: str) -> int | str:
    text = place.read().decode("utf-8", "replace").strip()
    value: object = text
    if ending == "json":
        try:
            value = json.loads(text)["label"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{place.shard}: {place.name} has no label.", LAYOUT, '{"label": 3}') from error
    elif re.fullmatch(r"\d+", text):
        value = int(text)
    if isinstance(value, str) and value:
        return value
    if type(value) is int and value >= 0:
        return value
    kind = "many labels" if isinstance(value, list) else f"the label {value!r}"
    raise InputError(
        f"{place.shard}: {place.name} has {kind}.",
        "finetune trains classifiers: each image has one class, a whole number from 0 or a name.",
        "a loop of your own with the pieces of condconv_surgery.training",
    )


def _class_names(labels: Sequence[int | str], names: Path) -> tuple[str, ...]:
    texts = sorted({label for label in labels if isinstance(label, str)})
    numbers = {label for label in labels if isinstance(label, int)}
    if texts and numbers:
        raise InputError(
            f"Some labels are numbers and some are names: {min(numbers)}, {texts[0]}.", LAYOUT, "write all alike"
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
