"""Image folders: which images a folder holds, and of which classes. ``folder_layout`` finds its parts.

images = scan(folder)                                        # FOLDER/CLASS/*: ImageFiles
images.path(0), images.labels[0], images.classes             # read one: decode_image.read_image(path)
images.skipped                                               # (("hidden", 2), ("not an image (.txt)", 1))
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from condconv_surgery.data.folder_layout import find_parts_of
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.data.walk_images import entries_of, images_below, loose_images, visible_folders
from condconv_surgery.errors import InputError, require_at_least_one

LAYOUT = "An image folder holds FOLDER/CLASS/*.png, or FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png."


@dataclass(frozen=True)
class ImageFiles(LabelledImages):
    """Labelled image files: ``files[i]``, relative to ``root``, belongs to ``classes[labels[i]]``.

    skipped: how many entries below ``root`` were not read, by reason.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: tuple[tuple[str, int], ...] = ()

    def name(self, index: int) -> str:
        return printable(str(self.path(index)))

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.root / self.files[index]

    def open(self, index: int) -> Image.Image:
        return Image.open(self.path(index))

    def subset(self, indices: Sequence[int]) -> ImageFiles:
        return replace(self, files=tuple(self.files[i] for i in indices), labels=tuple(self.labels[i] for i in indices))

    def recorded(self, rows: Iterable[tuple[str, str]]) -> ImageFiles:
        """The same folder with other images: the class and the file of each."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        pairs = [(file, numbers[name]) for name, file in rows]
        return replace(self, files=tuple(file for file, _ in pairs), labels=tuple(label for _, label in pairs))

    def key(self, index: int) -> str:
        return self.files[index]  # without the root: a folder may move


def find_unlabelled_images(folder: Path, limit: int) -> list[Path]:
    """Up to ``limit`` images at any depth of the training folder in ``folder``, else of ``folder``, evenly chosen.

    Raises ``InputError`` for a folder without images.
    """
    require_folder(folder)
    parts = find_parts_of(folder)
    root = parts.train or (folder if not parts.divided else next(p for p in (parts.val, parts.test) if p))
    return images_at_any_depth(root, limit)


def images_at_any_depth(root: Path, limit: int) -> list[Path]:
    """Up to ``limit`` images directly in ``root`` or below it, evenly chosen. Raises ``InputError`` without any."""
    require_at_least_one("limit", limit, 1000)
    below, _ = images_below(root, visible_folders(root))
    files = loose_images(root) + [file for name in below for file in below[name]]
    if not files:
        raise InputError(f"{root} has no images.", "Images may be at any depth below it.", 'data="FOLDER"')
    count = min(limit, len(files))
    return [root / files[i * len(files) // count] for i in range(count)]


def scan(root: Path, min_classes: int = 2) -> ImageFiles:
    """All images below ``root``; each folder directly in it is a class. Sorted, so the order is the same anywhere."""
    require_folder(root)
    by_class, skipped_of = images_below(root, visible_folders(root))
    classes, skipped = tuple(by_class), sum(skipped_of.values(), Counter[str]())
    if not any(by_class.values()):
        raise _nothing_labelled(root, skipped)
    if not all(by_class.values()):
        raise _empty_classes(root, {name: skipped_of[name] for name in classes if not by_class[name]})
    if len(classes) < min_classes:
        inner = visible_folders(root / classes[0])
        raise InputError(
            f"{root} has one class only: {classes[0]}.",
            "A classifier needs at least two class folders.",
            f'data="{root / classes[0]}"' if len(inner) > 1 else 'data="FOLDER"',
        )
    files = tuple(file for name in classes for file in by_class[name])
    labels = tuple(label for label, name in enumerate(classes) for _ in by_class[name])
    return ImageFiles(root, tuple(map(printable, classes)), files, labels, tuple(sorted(skipped.items())))


def printable(name: str) -> str:
    """A file name in UTF-8: bytes of another encoding as ``\\xe9``, so that it can be printed and stored."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _nothing_labelled(root: Path, skipped: Mapping[str, int]) -> InputError:
    loose = len(loose_images(root))
    if loose:
        reason = f"{loose} images are directly in it, not in class folders"
    else:
        reason = "no images in class folders" + (f" (skipped: {_counted(skipped)})" if skipped else "")
    return InputError(f"{root} has no labelled images: {reason}.", LAYOUT, _fix(skipped, _other_kind(root)))


def _other_kind(root: Path) -> str:
    """What to type for a folder of shards or of a data set that the ``datasets`` library reads."""
    names = [entry.name for entry in entries_of(root)]
    if any(name.endswith(".tar") for name in names):
        return f'data="{root}/*.tar"'
    of_datasets = any(name.endswith((".parquet", ".arrow")) or name == "dataset_dict.json" for name in names)
    return f'data="hf:{root}"' if of_datasets else 'data="FOLDER"'


def _empty_classes(root: Path, empty: Mapping[str, Mapping[str, int]]) -> InputError:
    """Class folders without readable files: says what is in them, so that nobody deletes data."""
    shown = [f"{name} ({_counted(skipped)})" if skipped else name for name, skipped in list(empty.items())[:5]]
    reasons = [why for skipped in empty.values() for why in skipped]
    fix = "convert these files to PNG or JPEG, or move the folders away" if reasons else "remove them, or fill them"
    return InputError(f"{root} has class folders without images: {', '.join(shown)}.", LAYOUT, _fix(reasons, fix))


def _counted(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(skipped.items()))


def _fix(skipped: Iterable[str], otherwise: str) -> str:
    return "pip install pillow-heif" if any("pillow-heif" in why for why in skipped) else otherwise


def require_folder(folder: Path, argument: str = "data") -> None:
    """Raise ``InputError`` unless ``folder``, which that argument names, is a folder that can be read."""
    if not folder.exists():
        raise InputError(f"There is no {folder}.", LAYOUT, f'{argument}="FOLDER"')
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder.", LAYOUT, f'{argument}="FOLDER"')
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(
            f"{folder} cannot be read.", "The folder must be readable.", f"chmod -R u+rX {shlex.quote(str(folder))}"
        )
