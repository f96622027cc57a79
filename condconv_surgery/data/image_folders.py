"""Which pictures a folder holds: classes, train and validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from condconv_surgery.data.labelled_images import Labelled, matched, split
from condconv_surgery.errors import InputError

LAYOUT = "A data folder holds FOLDER/CLASS/*.png, or FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png."
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Pictures(Labelled):
    """Labelled picture files: ``files[i]``, relative to ``root``, belongs to ``classes[labels[i]]``."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def name(self, index: int) -> str:
        return str(self.path(index))

    def path(self, index: int) -> Path:
        """The file of one picture."""
        return self.root / self.files[index]

    def open(self, index: int) -> Image.Image:
        return Image.open(self.path(index))

    def subset(self, indices: Sequence[int]) -> Pictures:
        return replace(self, files=tuple(self.files[i] for i in indices), labels=tuple(self.labels[i] for i in indices))

    def key(self, index: int) -> str:
        return self.files[index]  # without the root: a folder may move


def find_pictures(folder: Path, val_fraction: float = 0.2, seed: int = 0) -> tuple[Pictures, Pictures]:
    """The training and the validation pictures of a folder.

    With subfolders ``train`` and ``val`` they are taken as they are; otherwise each class is split, the same way for
    the same seed. Raises ``InputError`` for a folder that cannot be trained on.
    """
    require_folder(folder)
    train_root = _first_folder(folder, TRAIN_NAMES)
    val_root = _first_folder(folder, VAL_NAMES)
    if train_root is None:
        return split(scan(folder), val_fraction, seed)
    train = scan(train_root)
    if val_root is None:
        return split(train, val_fraction, seed)
    return train, matched(scan(val_root, least_classes=1), train, str(val_root))


def scan(root: Path, least_classes: int = 2) -> Pictures:
    """All pictures below ``root``; each folder directly in it is a class. Sorted, so the order is the same anywhere."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = _pictures_below(root, name)
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if not files:
        loose = sum(_is_picture(entry.name) for entry in root.iterdir())
        inside = f"{loose} pictures directly in it, but no class folders with pictures" if loose else "no pictures"
        raise InputError(f"{root} has {inside}.", LAYOUT, "--data FOLDER")
    if empty:
        raise InputError(
            f"{root} has class folders without pictures: {', '.join(empty[:5])}.", LAYOUT, "remove them, or fill them"
        )
    if len(classes) < least_classes:
        raise InputError(
            f"{root} has one class only: {classes[0]}.",
            "A classifier needs at least two class folders.",
            "--data FOLDER",
        )
    return Pictures(root, tuple(classes), tuple(files), tuple(labels))


def require_folder(folder: Path) -> None:
    """Raise ``InputError`` unless ``folder`` is one that can be read."""
    if not folder.exists():
        raise InputError(f"There is no {folder}.", LAYOUT, "--data FOLDER")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder.", LAYOUT, "--data FOLDER")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder} cannot be read.", "The folder must be readable.", f"chmod -R u+rX {folder}")


def _first_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _pictures_below(root: Path, name: str) -> list[str]:
    found = []
    for folder, _, names in os.walk(root / name, followlinks=True):
        found += [str((Path(folder) / file).relative_to(root)) for file in names if _is_picture(file)]
    return sorted(found)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
