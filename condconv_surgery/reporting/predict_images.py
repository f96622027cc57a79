"""``predict``: the prediction of a classifier for each image of some data."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from condconv_surgery.errors import require_at_least_one
from condconv_surgery.reporting.images.collect_gates import predict_batches
from condconv_surgery.reporting.images.network_routing import predictions_of
from condconv_surgery.reporting.images.predictions import Predictions
from condconv_surgery.reporting.images.report_images import find_images_to_predict
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.modes import input_spec_of
from condconv_surgery.runtime.wrappers import unwrapped


def predict(model: nn.Module, data: str | Path, *, limit: int | None = None, batch: int = 32) -> Predictions:
    """The predictions of ``model`` in eval mode, with accuracy by class, confusion matrix and calibration.

        import condconv_surgery as cs
        found = cs.predict(cs.load("run/best.safetensors"), "run")   # the validation images of that run
        print(found.accuracy, found.calibration.error)

    data: what ``finetune`` reads (its validation part, else its test part, else all), a run directory (the validation
    images of that run), or a folder with images directly in it, of which all at any depth are taken, without labels,
    unless its folders are classes of the model. limit: at most so many, equally many of each class. Raises
    ``InputError`` for data without images, and for outputs that are not finite.
    """
    require_at_least_one("batch", batch, 32)
    model = unwrapped(model)
    classes = classes_of(model)
    images = find_images_to_predict(data, limit, classes)
    labels, outputs = predict_batches(model, images.batches(input_spec_of(model), batch))
    return predictions_of(images, outputs, labels, classes)
