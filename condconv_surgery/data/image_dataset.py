"""Images as samples and batches: decode, transform, replace or omit an image that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from condconv_surgery.data.decode_image import UnreadableImageError
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.runtime.seeding import seeded

Transform = Callable[[Image.Image], Tensor]


class Draw(NamedTuple):
    """One image in one epoch. With the seed it determines the random transforms."""

    epoch: int
    image: int


class UnreadableName(str):
    """The name of an image that cannot be read, and the reason."""

    __slots__ = ("reason",)
    reason: str

    def __new__(cls, name: str, reason: str) -> UnreadableName:
        self = super().__new__(cls, name)
        self.reason = reason
        return self

    def __reduce__(self) -> tuple[type[UnreadableName], tuple[str, str]]:
        return type(self), (str(self), self.reason)  # from a loader's process


class Sample(NamedTuple):
    """``image`` [C, H, W], ``None`` when it cannot be read, and its class; ``unreadable``: names of skipped images."""

    image: Tensor | None
    label: int
    unreadable: tuple[str, ...] = ()


class Batch(NamedTuple):
    """``images`` [B, C, H, W], ``labels`` [B] int64."""

    images: Tensor
    labels: Tensor
    unreadable: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copies overlap with computation."""
        return self._replace(
            images=self.images.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True)
        )


class ImageDataset(Dataset[Sample]):
    """Labelled images as transformed samples, each a function of (seed, epoch, image) only.

    replace: the next readable image replaces an unreadable one, so that a training batch keeps its size; otherwise an
        unreadable image is omitted, so that no image is scored twice.
    least: pixels of an image's shorter side that the transform needs (``decode_image``).
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: Transform,
        *,
        channels: int = 3,
        seed: int = 0,
        replace: bool = False,
        least: int = 0,
    ) -> None:
        self.images = images
        self.transform = transform
        self.channels = channels
        self.seed = seed
        self.replace = replace
        self.least = least

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Sample:
        unreadable: list[str] = []
        for step in range(len(self) if self.replace else 1):
            index = (draw.image + step) % len(self)
            try:
                image = self.images.decode(index, self.channels, self.least)
            except UnreadableImageError as error:
                unreadable.append(UnreadableName(self.images.name(index), error.reason))
                continue
            with seeded(self.seed, "transform", draw.epoch, draw.image):
                return Sample(self.transform(image), self.images.labels[index], tuple(unreadable))
        return Sample(None, -1, tuple(unreadable))


def collate(samples: Sequence[Sample]) -> Batch:
    """Readable samples as one batch; ``images`` is empty when there are none."""
    read = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in read if sample.image is not None]) if read else torch.empty(0)
    labels = torch.tensor([sample.label for sample in read], dtype=torch.int64)
    return Batch(images, labels, tuple(name for sample in samples for name in sample.unreadable))


def collate_whole(samples: Sequence[Sample]) -> Batch:
    """A batch that keeps its size: the next readable sample of the batch replaces an unreadable one."""
    read = [position for position, sample in enumerate(samples) if sample.image is not None]
    if not read:
        return collate(samples)
    sources = [next((r for r in read if r >= position), read[0]) for position in range(len(samples))]
    unreadable = tuple(name for sample in samples for name in sample.unreadable)
    return collate([samples[position] for position in sources])._replace(unreadable=unreadable)
