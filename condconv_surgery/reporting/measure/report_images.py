"""The labelled images on which routing is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from condconv_surgery.data.decode_image import read_image
from condconv_surgery.data.image_folders import ImageFiles, find_evaluation_images
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec


@dataclass(frozen=True)
class ReportImages:
    """Image files, and whether they come from a validation folder, apart from the training images."""

    images: ImageFiles
    held_out: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the folder."""
        return self.images.classes

    @property
    def files(self) -> tuple[str, ...]:
        """Path of each image."""
        return tuple(self.images.name(i) for i in range(len(self.images)))

    def batches(self, spec: InputSpec, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``images`` [B, C, H, W], preprocessed for the model, and ``labels`` [B]. Raises for a damaged file."""
        transform = EvaluationTransform(spec)
        for start in range(0, len(self.images), size):
            paths = [self.images.path(i) for i in range(start, min(start + size, len(self.images)))]
            images = torch.stack([transform(read_image(path, spec.channels)) for path in paths])
            yield images, torch.tensor(self.images.labels[start : start + size])


def find_images(folder: str | Path, limit: int = 1000) -> ReportImages:
    """The validation images of a folder, else all its images; of more than ``limit``, equally many of each class.

    Raises ``InputError`` for a folder without labelled images.
    """
    return ReportImages(*find_evaluation_images(Path(folder), limit))
