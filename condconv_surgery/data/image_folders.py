"""Image folders: which images a folder holds, of which classes, and which of them are for validation.

    train, val = find_training_images(folder, val_fraction=0.2, seed=0)      # to train on: ImageFiles, ImageFiles
    images, held_out = find_evaluation_images(folder, limit=1000)            # to evaluate on: ImageFiles, bool
    images.path(0), images.labels[0], images.classes                         # read one: image_dataset.read_image(path)

Both read ``FOLDER/train/CLASS/*`` and ``FOLDER/val/CLASS/*`` by the names in ``TRAIN_NAMES`` and ``VAL_NAMES``, else
``FOLDER/CLASS/*``. They differ where only one of the two exists: training uses ``val`` only beside a ``train``
folder, evaluation uses it alone as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from condconv_surgery.data.labelled_images import LabelledImages, even_subset, split, with_classes_of
from condconv_surgery.errors import InputError

LAYOUT = "An image folder holds FOLDER/CLASS/*.png, or FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png."
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class ImageFiles(LabelledImages):
    """Labelled image files: ``files[i]``, relative to ``root``, belongs to ``classes[labels[i]]``."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def name(self, index: int) -> str:
        return str(self.path(index))

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.root / self.files[index]

    def open(self, index: int) -> Image.Image:
        return Image.open(self.path(index))

    def subset(self, indices: Sequence[int]) -> ImageFiles:
        return replace(self, files=tuple(self.files[i] for i in indices), labels=tuple(self.labels[i] for i in indices))

    def key(self, index: int) -> str:
        return self.files[index]  # without the root: a folder may move


def find_training_images(folder: Path, val_fraction: float = 0.2, seed: int = 0) -> tuple[ImageFiles, ImageFiles]:
    """The training and the validation images of a folder.

    With subfolders ``train`` and ``val`` both are used as they are; otherwise each class is split by the seed. Raises
    ``InputError`` for a folder that cannot be trained on.
    """
    require_folder(folder)
    train_root = _first_folder(folder, TRAIN_NAMES)
    val_root = _first_folder(folder, VAL_NAMES)
    if train_root is None:
        return split(scan(folder), val_fraction, seed)
    train = scan(train_root)
    if val_root is None:
        return split(train, val_fraction, seed)
    return train, with_classes_of(train, scan(val_root, min_classes=1), str(val_root))


def find_evaluation_images(folder: Path, limit: int | None = None) -> tuple[ImageFiles, bool]:
    """The images of the validation folder in ``folder``, else all of its images, and whether there is such a folder.

    Of more than ``limit`` images, an ``even_subset``. Raises ``InputError`` for a folder without labelled images.
    """
    require_folder(folder)
    val_root = _first_folder(folder, VAL_NAMES)
    images = scan(val_root or folder, min_classes=1)
    return (images if limit is None else even_subset(images, limit)), val_root is not None


def find_unlabelled_images(folder: Path, limit: int) -> list[Path]:
    """Up to ``limit`` images at any depth of the training folder in ``folder``, else of ``folder``, evenly chosen.

    Raises ``InputError`` for a folder without images.
    """
    require_folder(folder)
    root = _first_folder(folder, TRAIN_NAMES) or folder
    files = _images_below(root, "")
    if not files:
        raise InputError(f"{root} has no images.", "Images may be at any depth below it.", 'data="FOLDER"')
    count = min(limit, len(files))
    return [root / files[i * len(files) // count] for i in range(count)]


def scan(root: Path, min_classes: int = 2) -> ImageFiles:
    """All images below ``root``; each folder directly in it is a class. Sorted, so the order is the same anywhere."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    by_class = {name: _images_below(root, name) for name in classes}
    if not any(by_class.values()):
        loose = sum(_is_image(entry.name) for entry in root.iterdir())
        reason = f"{loose} images are directly in it, not in class folders" if loose else "no images in class folders"
        raise InputError(f"{root} has no labelled images: {reason}.", LAYOUT, 'data="FOLDER"')
    empty = [name for name, files in by_class.items() if not files]
    if empty:
        raise InputError(
            f"{root} has class folders without images: {', '.join(empty[:5])}.", LAYOUT, "remove them, or fill them"
        )
    if len(classes) < min_classes:
        raise InputError(
            f"{root} has one class only: {classes[0]}.",
            "A classifier needs at least two class folders.",
            'data="FOLDER"',
        )
    files = tuple(file for name in classes for file in by_class[name])
    labels = tuple(label for label, name in enumerate(classes) for _ in by_class[name])
    return ImageFiles(root, tuple(classes), files, labels)


def require_folder(folder: Path) -> None:
    """Raise ``InputError`` unless ``folder`` is a folder that can be read."""
    if not folder.exists():
        raise InputError(f"There is no {folder}.", LAYOUT, 'data="FOLDER"')
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder.", LAYOUT, 'data="FOLDER"')
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder} cannot be read.", "The folder must be readable.", f"chmod -R u+rX {folder}")


def _first_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _images_below(root: Path, name: str) -> list[str]:
    files = []
    for folder, _, names in os.walk(root / name, followlinks=True):
        files += [str((Path(folder) / file).relative_to(root)) for file in names if _is_image(file)]
    return sorted(files)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
