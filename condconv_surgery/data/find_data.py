"""Find the images that ``data`` names: a folder, shards, or a data set by name; and divide them.

Every command reads its images here: ``finetune`` and ``compare`` divide the parts, ``report`` measures one of them,
``check`` describes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from condconv_surgery.data.duplicates import duplicate_groups
from condconv_surgery.data.folder_layout import FolderParts, find_parts_of
from condconv_surgery.data.hub_datasets import hub_images, load_splits, require_datasets, split_names
from condconv_surgery.data.image_folders import require_folder, scan
from condconv_surgery.data.labelled_images import LabelledImages, split, with_classes_of
from condconv_surgery.data.torchvision_datasets import find_torchvision, require_known, second_part
from condconv_surgery.data.webdataset_shards import find_shards, scan_shards
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_sections import DataOptions


@dataclass(frozen=True)
class Part:
    """One part of a data set: where it comes from, and its images, which are listed when they are asked for."""

    where: str
    find: Callable[[], LabelledImages]


@dataclass(frozen=True)
class DataParts:
    """``train``, and ``val`` and ``test`` where the data have such parts. unread: folders beside them, not read."""

    train: LabelledImages
    where: str
    val: Part | None = None
    test: Part | None = None
    unread: tuple[str, ...] = ()

    def images(self, part: Part) -> LabelledImages:
        """The images of a part, with the class numbers of ``train``. Raises ``InputError``."""
        return with_classes_of(self.train, part.find(), part.where)


@dataclass(frozen=True)
class DividedData:
    """``train`` and ``val`` of a run, and a sentence that says where the validation images come from.

    split_off: ``val`` was split off from the training images; the data have no validation part.
    """

    train: LabelledImages
    val: LabelledImages
    origin: str
    unread: tuple[str, ...] = ()
    split_off: bool = False


def source_of(data: object) -> str:
    """``data`` as text. Raises ``InputError`` for what is neither a path nor a name, such as a data set in memory."""
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data)
    raise InputError(
        f"data= is a {type(data).__name__}.",
        "It is the path of images or the name of a data set: a folder, shards, torchvision:NAME, hf:PATH_OR_NAME.",
        'data="FOLDER"; or your own loop with the functions of condconv_surgery.training',
    )


def find_data(options: DataOptions, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The training and the validation images. Raises ``InputError`` for missing or unusable data."""
    divided = divide(find_parts(options), options, seed)
    return divided.train, divided.val


def divide(parts: DataParts, options: DataOptions, seed: int) -> DividedData:
    """Training and validation images; validation images are split off where the data have none.

    A part called test is never used to select: it is left alone, which ``origin`` says.
    """
    if parts.val is not None:
        origin = f"{parts.val.where}."
        train, val = parts.train, parts.images(parts.val)
    else:
        groups = duplicate_groups(parts.train) if options.group_duplicates else None
        train, val = split(parts.train, options.val_fraction, seed, groups)
        origin = f"{options.val_fraction:.0%} of each class of {parts.where}, chosen by the seed {seed}."
    if parts.test is not None:
        origin += f" {parts.test.where} is not used: test images do not select."
    if parts.unread:
        origin += f" Not read: {', '.join(parts.unread[:5])}."
    return DividedData(train, val, origin, parts.unread, split_off=parts.val is None)


def find_parts(options: DataOptions) -> DataParts:
    """The parts of the data that ``options`` name. Raises ``InputError`` for missing or unusable data."""
    source, val = options.folder, options.val
    kind, _, name = source.partition(":")
    if kind == "torchvision":
        return _torchvision_parts(options, name)
    if kind == "hf":
        return _hub_parts(options)
    if is_shards(source):
        return DataParts(scan_shards(source), source, Part(val, lambda: scan_shards(val)) if val else None)
    parts = folder_parts(options)
    if parts.divided and parts.train is None:
        only = parts.val or parts.test
        raise InputError(
            f"{source} has {only.name if only else 'no parts'} and no training images.",
            "A run needs images to train on: FOLDER/train/CLASS/* or FOLDER/CLASS/*.",
            f'rename a folder to train, or data="{only}" to train on that one',
        )
    root = parts.train or parts.root
    if val:
        second = _second_folder(Path(val), options.layout)
        return DataParts(scan(root), str(root), _part(second), None, parts.unread)
    return DataParts(scan(root), str(root), _part(parts.val), _part(parts.test), parts.unread)


def require_data(options: DataOptions) -> None:
    """Check what can be checked before a model is loaded. Raises ``InputError``."""
    kind, _, name = options.folder.partition(":")
    if options.streaming and kind != "hf":
        raise InputError(
            f'data.streaming=True with data="{options.folder}".',
            "Only Hugging Face data sets are streamed.",
            'data="hf:NAME", or data.streaming=False',
        )
    if kind == "torchvision":
        require_known(name)
        if options.val and options.val != second_part(name):
            raise InputError(
                f'data.val="{options.val}" with data="{options.folder}".',
                f"The set has its own parts: train and {second_part(name)}.",
                f'data.val="", or data.val="{second_part(name)}"',
            )
    elif kind == "hf":
        require_datasets()
    elif is_shards(options.folder):
        find_shards(options.folder)
        if options.val:
            find_shards(options.val)
    else:
        require_folder(Path(options.folder))


def is_shards(source: str) -> bool:
    """A file or pattern of tar files, not a folder."""
    return not Path(source).is_dir() and (".tar" in Path(source).name or "://" in source or source.startswith("pipe:"))


def is_folder(options: DataOptions) -> bool:
    """Neither shards nor a data set by name."""
    return options.folder.partition(":")[0] not in ("torchvision", "hf") and not is_shards(options.folder)


def folder_parts(options: DataOptions) -> FolderParts:
    """The parts of a folder of images. Raises ``InputError`` for a layout that can be read in two ways."""
    require_folder(Path(options.folder))
    return find_parts_of(Path(options.folder), options.layout)


def _second_folder(folder: Path, layout: str) -> Path:
    """The folder of ``data.val``, or the part in it."""
    require_folder(folder, "data.val")
    parts = find_parts_of(folder, layout)
    return parts.val or parts.test or parts.train or folder


def _part(root: Path | None) -> Part | None:
    return None if root is None else Part(str(root), lambda: scan(root, min_classes=1))


def _torchvision_parts(options: DataOptions, name: str) -> DataParts:
    sets = find_torchvision(name, Path(options.root), options.download)
    if options.val:
        sets = {"train": sets["train"], "val": sets[second_part(name)]}
    given = {role: Part(f"{images.title} {role}", lambda images=images: images) for role, images in sets.items()}  # type: ignore[misc]
    return DataParts(sets["train"], given["train"].where, given.get("val"), given.get("test"))


def _hub_parts(options: DataOptions) -> DataParts:
    """The splits of ``hf:PATH_OR_NAME``; each is read when it is asked for: a test split may have no labels."""
    rows = load_splits(options, streaming=False)
    names = split_names(list(rows), options)
    titles = {role: f"{options.folder.partition(':')[2]} {name}" for role, name in names.items()}
    given = {
        role: Part(titles[role], lambda role=role, name=name: hub_images(rows[name], titles[role], options))  # type: ignore[misc]
        for role, name in names.items()
    }
    unread = tuple(f"the split {name}" for name in rows if name not in names.values())
    return DataParts(given["train"].find(), given["train"].where, given.get("val"), given.get("test"), unread)
