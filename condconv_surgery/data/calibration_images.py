"""Images without labels that show a converted model's routers in which directions features vary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from condconv_surgery.data.image_dataset import read_image
from condconv_surgery.data.image_folders import find_unlabelled_images
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec

CALIBRATION_IMAGES = 256


def calibration_images(folder: Path, spec: InputSpec, batch: int = 16) -> Iterator[Tensor]:
    """Batches [B, C, H, W] of up to ``CALIBRATION_IMAGES`` of the folder's images, preprocessed for the model.

    Raises ``InputError`` for a folder without images or a damaged file.
    """
    transform = EvaluationTransform(spec)
    paths = find_unlabelled_images(folder, CALIBRATION_IMAGES)
    for start in range(0, len(paths), batch):
        yield torch.stack([transform(read_image(path, spec.channels)) for path in paths[start : start + batch]])
