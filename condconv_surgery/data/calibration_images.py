"""Images without labels that show a converted model's routers in which directions features vary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from condconv_surgery.data.decode_image import UnreadableImageError, read_image
from condconv_surgery.data.evaluation_images import is_run, training_images_of
from condconv_surgery.data.find_data import find_parts, is_folder, require_data
from condconv_surgery.data.image_folders import find_unlabelled_images
from condconv_surgery.data.labelled_images import LabelledImages, even_subset
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import DataOptions

CALIBRATION_IMAGES = 256


def calibration_images(source: str | Path, spec: InputSpec, batch: int = 16) -> Iterator[Tensor]:
    """Batches [B, C, H, W] of up to ``CALIBRATION_IMAGES`` training images, preprocessed for the model.

    source: a folder, with or without classes, another source that ``finetune`` reads as ``data``, or the directory of
    a run, for the images that it trained on. Raises ``InputError`` for a source without images or a damaged file.
    """
    if is_run(str(source)):
        yield from calibration_subset(training_images_of(Path(source)), spec, batch)
        return
    options = DataOptions(folder=str(source))
    require_data(options)
    if not is_folder(options):
        yield from calibration_subset(find_parts(options).train, spec, batch)
        return
    transform = EvaluationTransform(spec)
    paths = find_unlabelled_images(Path(source), CALIBRATION_IMAGES)
    for start in range(0, len(paths), batch):
        yield torch.stack(
            [transform(read_image(path, spec.channels, transform.least)) for path in paths[start : start + batch]]
        )


def calibration_subset(images: LabelledImages, spec: InputSpec, batch: int = 16) -> list[Tensor]:
    """Batches [B, C, H, W] of up to ``CALIBRATION_IMAGES`` images, evenly from all classes, without unreadable ones."""
    transform, chosen = EvaluationTransform(spec), even_subset(images, CALIBRATION_IMAGES)
    found = []
    for index in range(len(chosen)):
        with suppress(UnreadableImageError):
            found.append(transform(chosen.decode(index, spec.channels, transform.least)))
    return [torch.stack(found[start : start + batch]) for start in range(0, len(found), batch)]
