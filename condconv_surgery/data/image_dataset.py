"""From a file to a tensor: reading, transforming, and what happens to a picture that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from condconv_surgery.data.labelled_images import Labelled
from condconv_surgery.models.preprocess import flat
from condconv_surgery.runtime.seeding import seeded

Transform = Callable[[Image.Image], Tensor]


class Draw(NamedTuple):
    """One picture in one epoch: all that its random transforms depend on, beside the seed."""

    epoch: int
    picture: int


class Sample(NamedTuple):
    """``image`` [C, H, W] and its class; ``unreadable`` names files passed over. No image: nothing could be read."""

    image: Tensor | None
    label: int
    unreadable: tuple[str, ...] = ()


class Batch(NamedTuple):
    """``images`` [B, C, H, W], ``labels`` [B] int64."""

    images: Tensor
    labels: Tensor
    unreadable: tuple[str, ...] = ()


class PictureDataset(Dataset[Sample]):
    """Labelled pictures, each a function of (seed, epoch, picture) and of nothing else.

    replace: an unreadable picture is replaced by the next readable one, so that a training batch keeps its size;
        otherwise it is left out, so that no picture is scored twice.
    """

    def __init__(
        self, pictures: Labelled, transform: Transform, *, channels: int = 3, seed: int = 0, replace: bool = False
    ) -> None:
        self.pictures = pictures
        self.transform = transform
        self.channels = channels
        self.seed = seed
        self.replace = replace

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: Draw) -> Sample:
        unreadable: list[str] = []
        for step in range(len(self) if self.replace else 1):
            index = (draw.picture + step) % len(self)
            try:
                picture = decoded(lambda index=index: self.pictures.open(index), self.channels)  # type: ignore[misc]
            except UnreadablePictureError:
                unreadable.append(self.pictures.name(index))
                continue
            with seeded(self.seed, "transform", draw.epoch, draw.picture):
                return Sample(self.transform(picture), self.pictures.labels[index], tuple(unreadable))
        return Sample(None, -1, tuple(unreadable))


class UnreadablePictureError(Exception):
    """A file that ends in .png or the like and is not a whole picture."""


def read_picture(path: Path, channels: int = 3) -> Image.Image:
    """The picture in a file. Raises ``UnreadablePictureError``."""
    try:
        return decoded(lambda: Image.open(path), channels)
    except UnreadablePictureError as error:
        raise UnreadablePictureError(str(path)) from error


def decoded(opened: Callable[[], Image.Image], channels: int = 3) -> Image.Image:
    """What ``opened()`` gives, in RGB (or grey for one channel), transparency laid on white.

    Raises ``UnreadablePictureError`` where PIL can't open it, finds it cut short, or warns of a bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with opened() as picture:
                return flat(picture, channels)
    except Exception as error:  # PIL's readers raise whatever the bytes lead them into
        raise UnreadablePictureError from error


def collate(samples: Sequence[Sample]) -> Batch:
    """Readable samples as one batch; ``images`` is empty when there are none."""
    read = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in read if sample.image is not None]) if read else torch.empty(0)
    labels = torch.tensor([sample.label for sample in read], dtype=torch.int64)
    return Batch(images, labels, tuple(name for sample in samples for name in sample.unreadable))


def collate_whole(samples: Sequence[Sample]) -> Batch:
    """A batch that keeps its size: the next readable picture of the batch takes the place of an unreadable one."""
    read = [position for position, sample in enumerate(samples) if sample.image is not None]
    if not read:
        return collate(samples)
    taken = [next((r for r in read if r >= position), read[0]) for position in range(len(samples))]
    unreadable = tuple(name for sample in samples for name in sample.unreadable)
    return collate([samples[position] for position in taken])._replace(unreadable=unreadable)
