"""``condconv predict``: the prediction for each image, as CSV, with accuracy by class and calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condconv_surgery.errors import InputError

from .model_to_run import load_to_run, own_split, require_precision, run_of
from .output.console import print_json, say

if TYPE_CHECKING:
    from condconv_surgery.reporting import Predictions


def predict(
    model: Annotated[str, typer.Argument(help="A file, torchvision:NAME, timm:NAME, pkg.mod:factory.")],
    data: Annotated[
        str | None,
        typer.Option(help="Images, as finetune reads them; a run's folder: its validation images; or without classes."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The CSV file to write. Default: stdout.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Largest number of images, equally many of each class. Default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of a batch.")] = 32,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    round_experts: Annotated[
        str | None, typer.Option(help="Hold experts in int8 or bfloat16, as when serving (cs.round_experts).")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of a bare state_dict: torchvision:NAME.")] = None,
    weights: Annotated[str, typer.Option(help="default, none, or a FILE, for a model by name.")] = "default",
    input_size: Annotated[int | None, typer.Option(help="Side of the image in pixels, if not the model's own.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print accuracy by class, confusion matrix and calibration as JSON.")
    ] = False,
) -> None:
    """Predict the class of each image: CSV with image, label, predicted, confidence, correct."""
    if data is None:
        raise InputError("No images are given.", "predict needs images.", "--data FOLDER")
    if batch < 1 or (limit is not None and limit < 1):
        raise InputError(f"--batch {batch}, --limit {limit}.", "Both must be at least 1.", "--batch 32 --limit 1000")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"{output} cannot be written.", "It is a file in a folder that exists.", "-o predictions.csv")
    precision = require_precision(round_experts)
    from condconv_surgery.models.artifact.atomic_write import replacing
    from condconv_surgery.reporting import predict as predictions_of
    from condconv_surgery.reporting.render.prediction_tables import predictions_csv

    loaded = load_to_run(model, arch, weights, input_size, tuple(trust or ()), device, None, precision)
    found = predictions_of(loaded, own_split(data, model), limit=limit, batch=batch).of_run(run_of(model))
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(predictions_csv(found), encoding="utf-8")
        say(f"Wrote {output}: {len(found.images)} rows")
    if as_json:
        print_json(found.to_dict())
    elif output is None:
        print(predictions_csv(found), end="")
    _say_summary(found)


def _say_summary(found: Predictions) -> None:
    from condconv_surgery.reporting.render.prediction_tables import summary_lines

    for line in summary_lines(found):
        say(line)
