"""The labelled images on which routing is measured: a folder, in the order of file names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder

from condconv_surgery.errors import InputError
from condconv_surgery.models.preprocess import evaluation_transform
from condconv_surgery.recipe import InputSpec

LAYOUT = "A data folder holds FOLDER/CLASS/*.png, or FOLDER/val/CLASS/*.png."
VAL_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class ReportImages:
    """Image files and their labels, indices into ``classes``.

    held_out: whether they come from a validation folder, apart from the training images.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    held_out: bool = True

    def batches(self, spec: InputSpec, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``images`` [B, C, H, W], preprocessed for the model, and ``labels`` [B]."""
        transform = evaluation_transform(spec)
        for start in range(0, len(self.files), size):
            files = self.files[start : start + size]
            images = torch.stack([transform(read_image(file)) for file in files])
            yield images, torch.tensor(self.labels[start : start + size])


def find_images(folder: str | Path, limit: int = 1000) -> ReportImages:
    """The validation images of a folder, else all its images; of more than ``limit``, equally many of each class.

    Raises ``InputError`` for a folder without labelled images.
    """
    root = Path(folder)
    if not root.is_dir():
        what = f"{root} is a file, not a folder." if root.exists() else f"There is no {root}."
        raise InputError(what, LAYOUT, 'data="FOLDER"')
    held_out = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    root = held_out or root
    try:
        found = ImageFolder(str(root))
    except (FileNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{root} has no labelled images: {reason}", LAYOUT, 'data="FOLDER"') from error
    by_class: dict[int, list[str]] = {}
    for file, label in found.samples:
        by_class.setdefault(label, []).append(file)
    kept = _evenly(by_class, limit)
    files, labels = tuple(file for file, _ in kept), tuple(label for _, label in kept)
    return ReportImages(files, labels, tuple(found.classes), held_out is not None)


def read_image(file: str | Path) -> Image.Image:
    """Read and decode an image. Raises ``InputError`` for a damaged file."""
    try:
        with Image.open(file) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{file} is not a readable image: {error}", "The report reads every image of the folder.", "remove it"
        ) from error


def _evenly(by_class: dict[int, list[str]], limit: int) -> list[tuple[str, int]]:
    """Take the first image of each class, then the second of each, ..., up to ``limit``; in folder order."""
    turns = [
        (place, label, file) for label, files in sorted(by_class.items()) for place, file in enumerate(sorted(files))
    ]
    kept = sorted(turns)[:limit]
    return [(file, label) for _, label, file in sorted(kept, key=lambda turn: (turn[1], turn[0]))]
