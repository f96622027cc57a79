"""The images over which mixtures are averaged or activations calibrated, and those on which accuracy is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from condconv_surgery.data.calibration_images import calibration_images
from condconv_surgery.data.evaluation_images import NOT_HELD_OUT, find_evaluation_images, is_run
from condconv_surgery.data.labelled_images import LabelledImages, assumed_order, even_subset, logit_of_each_class
from condconv_surgery.deploy.mean_mixtures import Labelled
from condconv_surgery.errors import InputError, counted
from condconv_surgery.models.classifier_logits import main_logits
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.modes import device_of, dtype_of, in_mode, input_spec_of

BATCH = 32


class FolderBatches(Sequence[Labelled]):
    """Labelled images as batches, read again in each pass. logits: the index of each class of the data."""

    def __init__(self, images: LabelledImages, spec: InputSpec, logits: Tensor) -> None:
        self.images, self.spec, self.logits = images, spec, logits

    def __len__(self) -> int:
        return -(-len(self.images) // BATCH)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        transform = EvaluationTransform(self.spec)
        chosen = range(index * BATCH, min((index + 1) * BATCH, len(self.images)))
        images = [transform(self.images.decode(i, self.spec.channels, transform.least)) for i in chosen]
        return torch.stack(images), self.logits[torch.tensor([self.images.labels[i] for i in chosen])]


class DeploymentImages(NamedTuple):
    """calibration: the images of the means. labelled: those of the accuracy, if any; scored_on: which, as text."""

    calibration: Sequence[Labelled]
    labelled: Sequence[Labelled]
    scored_on: str = ""


def deployment_images(
    model: nn.Module, data: str | Path | Tensor | Iterable[Any], limit: int, spec: InputSpec | None = None
) -> DeploymentImages:
    """The training images of ``data`` for the means, its validation images for the accuracy; of a run, the run's own.

    limit: most labelled images of a folder. spec: what its images are made to, by default the model's own input.
    """
    if not isinstance(data, (str, Path)):
        batches = [_batch(batch) for batch in (torch.split(data, BATCH) if isinstance(data, Tensor) else data)]
        batches = [(images, labels) for images, labels in batches if len(images)]
        if not batches:
            raise InputError("data= holds no images.", "The means need some; 256 are enough.", "more images")
        return DeploymentImages(batches, batches)
    spec = spec or input_spec_of(model)
    calibration = [(images, None) for images in calibration_images(Path(data), spec, BATCH)]
    try:
        found = find_evaluation_images(DataOptions(folder=str(data)))
    except InputError:  # images without class folders
        if is_run(str(data)):
            raise
        return DeploymentImages(calibration, [])
    images = even_subset(found.images, limit)
    logits = _logits(model, images.classes, calibration[0][0])
    if logits is None:
        return DeploymentImages(calibration, [])
    scored_on = f"{counted(len(images), 'image')} of {found.where}."
    if not found.held_out:
        scored_on += f" {NOT_HELD_OUT}"
    if not classes_of(model):
        scored_on += f" {assumed_order(images.classes)}"
    return DeploymentImages(calibration, FolderBatches(images, spec, logits), scored_on)


def _batch(batch: Any) -> Labelled:
    x, *rest = batch if isinstance(batch, (tuple, list)) and batch else (batch,)
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise InputError(
            f"data= holds a {type(x).__name__} of shape {tuple(getattr(x, 'shape', ()))}.",
            "It is a folder, a tensor of images [N, C, H, W], or batches of them, alone or with labels.",
            "data=torch.utils.data.DataLoader(images, batch_size=32)",
        )
    if not x.is_floating_point():
        raise InputError(
            f"data= holds images of {x.dtype}.",
            "They are floats, normalised as the model was trained.",
            "data=FOLDER, whose images are made so",
        )
    labels = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].dim() == 1 else None
    return x, labels


def _logits(model: nn.Module, folder: tuple[str, ...], images: Tensor) -> Tensor | None:
    """The index in the logits of each class of the folder; None where the model has other classes."""
    classes = classes_of(model)
    if classes:
        return logit_of_each_class(folder, classes)
    with in_mode(model, training=False), torch.no_grad():
        output = model(images[:1].to(device_of(model), dtype_of(model)))
    logits = main_logits(output)
    return torch.arange(len(folder)) if logits.shape[1] == len(folder) else None
