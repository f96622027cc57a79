"""WebDataset shards: tar files in which the files of one image have the same name and different extensions.

    00017.png  00017.cls          the label: a class number, or a class name
    00018.jpg  00018.json         {"label": 3}

The headers of each shard are read once; after that each image is read at its offset in the file. So images are
shuffled one by one over all shards, divided between processes and resumed like those of a folder.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from condconv_surgery.data.decode_image import open_bytes
from condconv_surgery.data.image_folders import printable
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.data.walk_images import SUFFIXES, is_hidden
from condconv_surgery.errors import InputError

LAYOUT = "A shard holds pairs: NAME.png (or .jpg, .webp) and NAME.cls (or NAME.json with a label). A NAME has no dot."
PATTERN = "A pattern names plain tar files: a glob, or braces such as {000..127} and {a,b}."
GZIP = b"\x1f\x8b"
MOST_CLASSES = 1_000_000
READ_AFTER_END = 1 << 20


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
    """Labelled images in tar files. skipped: how many entries were not read, by reason."""

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    entries: tuple[ShardEntry, ...]
    root: str = field(default="", compare=False)
    skipped: tuple[tuple[str, int], ...] = ()

    def name(self, index: int) -> str:
        return printable(f"{self.entries[index].shard}/{self.entries[index].name}")

    def key(self, index: int) -> str:
        return f"{Path(self.entries[index].shard).name}/{self.entries[index].name}"

    def open(self, index: int) -> Image.Image:
        return open_bytes(self.entries[index].read())

    def subset(self, indices: Sequence[int]) -> ShardImages:
        return replace(
            self, labels=tuple(self.labels[i] for i in indices), entries=tuple(self.entries[i] for i in indices)
        )


def scan_shards(pattern: str) -> ShardImages:
    """The images in all shards of a pattern: ``train-{000..127}.tar``, ``shards/*.tar``, one file.

    Class names are those in ``classes.txt`` beside the shards (one per line), else the numbers or the names in the
    ``.cls`` files. Raises ``InputError`` for shards that are missing, compressed or hold something else.
    """
    paths, skipped = find_shards(pattern), Counter[str]()
    pairs = [pair for path in paths for pair in _pairs(path, skipped)]
    if not pairs:
        raise _nothing_labelled(pattern, skipped)
    entries, raw = zip(*pairs, strict=True)
    classes = _class_names(raw, paths[0].with_name("classes.txt"))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(label if isinstance(label, int) else numbers[label] for label in raw)
    return ShardImages(classes, labels, tuple(entries), pattern, tuple(sorted(skipped.items())))


def find_shards(pattern: str) -> list[Path]:
    """The files that match a pattern, in order. Raises ``InputError`` when one is missing, remote or compressed."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(
            f"{pattern} is not on this machine.",
            "Shards are read from a file system, each image at its offset.",
            'download or mount them, then data="FOLDER/SHARDS.tar"',
        )
    if Path(pattern).is_dir():
        raise InputError(
            f"{pattern} is a folder.", "Shards are validated on shards.", f'data.val="{Path(pattern) / "*.tar"}"'
        )
    paths: list[Path] = []
    for name in expand_braces(pattern):
        found = sorted(glob.glob(name)) if re.search(r"[*?\[]", name) else [name]  # noqa: PTH207  # absolute ones too
        if not found or not Path(found[0]).is_file():
            raise InputError(f"There is no {name}.", PATTERN, 'data="train-{000..127}.tar"')
        if name.endswith(("gz", "GZ")):
            raise _compressed(name)
        if not name.endswith(".tar"):
            raise InputError(f"{name} is not a .tar file.", PATTERN, 'data="NAME.tar"')
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


def _pairs(path: Path, skipped: Counter[str]) -> list[tuple[ShardEntry, int | str]]:
    """Each image of a shard with its label as it is written. What has no label or image is counted in ``skipped``."""
    found: dict[str, dict[str, ShardEntry]] = {"image": {}, "cls": {}, "json": {}}
    for entry in _entries(path):
        folder, _, base = entry.name.rpartition("/")
        stem, _, ending = base.partition(".")
        kind = "image" if f".{ending.lower()}" in SUFFIXES else ending.lower()
        if any(map(is_hidden, entry.name.split("/"))):
            skipped["hidden"] += 1
        elif kind not in found:
            skipped[f"not an image (.{printable(ending)})"] += 1
        elif found[kind].setdefault(f"{folder}/{stem}", entry) is not entry:
            skipped["further ones of the same name"] += 1
    images, labels = found["image"], found["json"] | found["cls"]
    if images and not labels:
        fix = f'tar -xf {shlex.quote(str(path))}, then data="FOLDER", if folders are the classes'
        raise InputError(f"{path} has images and no labels.", LAYOUT, fix)
    for key, entry in images.items():
        if key not in labels:
            raise InputError(f"{path} has no label for {printable(entry.name)}.", LAYOUT, "write the shard again")
    if alone := sum(key not in images for key in labels):
        skipped["label without an image"] += alone
    return [(entry, _label(labels[key])) for key, entry in images.items()]


def _entries(path: Path) -> Iterator[ShardEntry]:
    """The files in a shard. Raises ``InputError`` for one that is not read to its end, as ``tarfile`` does silently."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield ShardEntry(str(path), member.name, member.offset_data, member.size)
            file.seek(tar.offset)
            rest = file.read(READ_AFTER_END)
    except (tarfile.TarError, OSError) as error:
        if _is_compressed(path):
            raise _compressed(str(path)) from error
        raise _incomplete(path, str(error)) from error
    if len(rest) < tarfile.BLOCKSIZE:
        raise _incomplete(path, "the mark of its end is missing")
    if rest.strip(b"\0"):
        raise _incomplete(path, f"what follows byte {tar.offset} is neither a file nor the end")


def _label(entry: ShardEntry) -> int | str:
    text = entry.read().decode("utf-8", "backslashreplace").strip()
    value: object = text
    if entry.name.lower().endswith(".json"):
        try:
            value = json.loads(text)["label"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{entry.shard}: {entry.name} has no label.", LAYOUT, '{"label": 3}') from error
    elif re.fullmatch(r"[+-]?\d+", text):
        value = int(text)
    if isinstance(value, str) and value:
        return value
    if type(value) is int and 0 <= value < MOST_CLASSES:
        return value
    is_list = isinstance(value, list)
    raise InputError(
        f"{entry.shard}: {entry.name} has {'many labels' if is_list else f'the label {value!r}'}.",
        "finetune trains classifiers: each image has one class, a name or a number from 0 on without large gaps.",
        "your own loop with the functions of condconv_surgery.training" if is_list else "write the shard again",
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
    text = names.read_bytes().decode("utf-8-sig", "backslashreplace")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    repeated = next((name for name, count in Counter(lines).items() if count > 1), None)
    if repeated is not None:
        raise InputError(
            f"{names} has the name {repeated} more than once.", "A name for each class.", "tell them apart by a number"
        )
    if max(numbers) >= len(lines):
        raise InputError(
            f"{names} has {len(lines)} names, but there is a label {max(numbers)}.",
            "A name for each class.",
            "add them",
        )
    return lines


def _nothing_labelled(pattern: str, skipped: Mapping[str, int]) -> InputError:
    ranked = sorted(skipped.items(), key=lambda item: -item[1])
    found = ", ".join(f"{count} {why}" for why, count in ranked[:4]) + (", ..." if len(ranked) > 4 else "")
    return InputError(
        f"{pattern} has no labelled images{f' (skipped: {found})' if found else ''}.", LAYOUT, "write the shards again"
    )


def _incomplete(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a complete tar file: {why}.", LAYOUT, "write the shard again")


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def _compressed(name: str) -> InputError:
    return InputError(
        f"{name} is compressed: its images cannot be read at their offsets.",
        PATTERN,
        f"gunzip < {shlex.quote(name)} > PLAIN.tar",
    )
