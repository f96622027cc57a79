"""The layout of an image folder: which of its folders are parts (train, val, test) and which are classes.

A part is recognised by its name (``role_of``) and by what it holds: folders of classes, and no images of its own. So
``train`` beside ``bus`` and ``car`` can be a class. A layout that can be read in two ways is an error, not a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from condconv_surgery.data.walk_images import entries_of, is_hidden, visible_folders, why_no_image
from condconv_surgery.errors import InputError

ROLES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
"""Words for the parts, in upper or lower case."""

FILLERS = ("set", "sets", "data", "dataset", "split", "images", "image", "imgs", "img", "part", "folder")
PARTS = "A part is called train, val or test (or training, valid, validation, dev, ..., in upper or lower case)."
LOOKED_AT = 50  # files of a folder in which an image is looked for


@dataclass(frozen=True)
class FolderParts:
    """The folders of the parts. Where all are ``None``, the folders of ``root`` are classes.

    unread: folders beside the parts that are not read.
    """

    root: Path
    train: Path | None = None
    val: Path | None = None
    test: Path | None = None
    unread: tuple[str, ...] = ()

    @property
    def divided(self) -> bool:
        """Has the folder parts?"""
        return any((self.train, self.val, self.test))


def role_of(name: str) -> str | None:
    """The part that a name means.

    >>> [role_of(name) for name in ("Train", "val_set", "testing-images", "dev2017", "bullet train", "trainset")]
    ['train', 'val', 'test', 'val', None, 'train']
    """
    words = re.findall(r"[^\W\d_]+", name.lower())
    roles = [role for word in words for role, known in ROLES.items() if _without_filler(word) in known]
    others = [word for word in words if word not in FILLERS]
    return roles[0] if len(roles) == 1 and len(others) == 1 else None


def find_parts_of(root: Path, layout: str = "auto") -> FolderParts:
    """The parts of a folder. Raises ``InputError`` for a layout that can be read in two ways.

    layout: "classes" takes each folder for a class, whatever its name.
    """
    if layout == "classes":
        return FolderParts(root)
    names = visible_folders(root)
    if not any(map(role_of, names)) and any(_Folder.of(root / name).images for name in names):
        return FolderParts(root)  # classes by name and content; the others need not be listed
    folders = [_Folder.of(root / name) for name in names]
    folders = [folder for folder in folders if folder.classes or folder.images]
    parts: dict[str, _Folder] = {}
    for folder in (folder for folder in folders if folder.holds_classes and folder.role):
        if other := parts.get(folder.role or ""):
            raise _ambiguous(root, f"{other.name} and {folder.name} both mean {folder.role}", [other, folder])
        parts[folder.role or ""] = folder
    others = [folder for folder in folders if folder not in parts.values()]
    if "train" in parts:
        _check_beside(root, parts, others)
    elif parts:
        if _are_classes(root, parts, others):
            return FolderParts(root)
    else:
        _check_undivided(root, folders)
        return FolderParts(root)
    paths = {role: folder.path for role, folder in parts.items()}
    return FolderParts(root, paths.get("train"), paths.get("val"), paths.get("test"), tuple(f.name for f in others))


@dataclass(frozen=True)
class _Folder:
    path: Path
    classes: frozenset[str]
    images: bool

    @classmethod
    def of(cls, path: Path) -> _Folder:
        shown = [entry for entry in entries_of(path) if not is_hidden(entry.name)]
        files = islice((entry for entry in shown if not entry.is_dir()), LOOKED_AT)
        images = any(why_no_image(entry) is None for entry in files)
        return cls(path, frozenset(visible_folders(path)), images)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def role(self) -> str | None:
        return role_of(self.name)

    @property
    def holds_classes(self) -> bool:
        return bool(self.classes) and not self.images


def _check_beside(root: Path, parts: dict[str, _Folder], others: list[_Folder]) -> None:
    """Folders beside ``train``: an unknown part, or classes?"""
    train = parts["train"]
    for other in others:
        if other.role == "val":
            raise InputError(
                f"{other.path} holds images, not folders of classes.",
                "The validation images need their classes, as the training images have them.",
                f'make {other.path}/CLASS/*, or data="{train.path}" to split the training images',
            )
        if other.holds_classes and other.classes & train.classes:
            raise _ambiguous(root, f"{other.name}, beside {train.name}, has folders of the same names", [other])
        if other.images and not other.role and len(parts) == 1:
            raise _ambiguous(root, f"{train.name} holds folders, and {other.name} beside it images", [train, other])


def _are_classes(root: Path, parts: dict[str, _Folder], others: list[_Folder]) -> bool:
    """Without ``train``: are ``val`` and ``test`` classes among others?"""
    for part in parts.values():
        for other in others:
            if part.classes & other.classes:
                raise _ambiguous(root, f"{part.name} and {other.name} have folders of the same names", [other])
            if other.name in part.classes:
                raise _ambiguous(root, f"{other.name} is in it and in {part.name}", [part])
    return bool(others)


def _check_undivided(root: Path, folders: list[_Folder]) -> None:
    """Folders none of which is a part by name and content."""
    if len(folders) > 1 and all(folder.role for folder in folders):
        raise _ambiguous(root, f"{_names(folders)} hold images, not folders of classes", folders)
    nested = all(folder.holds_classes for folder in folders)
    if nested and 1 < len(folders) < 4:
        shared = frozenset.intersection(*(folder.classes for folder in folders))
        if len(shared) > 1:
            raise _ambiguous(root, f"{_names(folders)} all have the folders {', '.join(sorted(shared)[:4])}", folders)


def _ambiguous(root: Path, found: str, folders: list[_Folder]) -> InputError:
    return InputError(
        f"{root} can be read in two ways: {found}.",
        PARTS,
        f'rename {_names(folders)}; or name the folders: data="FOLDER" with data.val="FOLDER"; or '
        'data.layout="classes" if each folder is a class',
    )


def _names(folders: list[_Folder]) -> str:
    return " and ".join(folder.name for folder in folders[:4])


def _without_filler(word: str) -> str:
    """``train`` of ``trainset``."""
    return next((word.removesuffix(end) for end in FILLERS if word.endswith(end) and word != end), word)
