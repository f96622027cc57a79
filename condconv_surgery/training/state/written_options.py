"""The options as they are written into a run's folder: with absolute paths, so that any folder can resume the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from condconv_surgery.data.hub_datasets import place_of
from condconv_surgery.models.transformers_source import PREFIX
from condconv_surgery.recipe.training_options import TrainingOptions


def with_absolute_paths(options: TrainingOptions) -> TrainingOptions:
    """``options`` with the paths of files and folders made absolute; names (``torchvision:resnet18``) stay."""
    teacher = options.distill.teacher
    data: dict[str, Any] = {"folder": _absolute_source(options.data.folder)}
    kind = options.data.folder.partition(":")[0]
    if kind == "torchvision":
        data["root"] = os.path.abspath(options.data.root)  # noqa: PTH100  # without following links
    elif kind != "hf" and options.data.val:
        data["val"] = _absolute_source(options.data.val)
    return options.updated(
        {
            "model": _absolute_model(options.model),
            "weights": _absolute_file(options.weights),
            "output": os.path.abspath(options.output),  # noqa: PTH100
            "data": data,
            "distill": {"teacher": teacher if teacher == "start" else _absolute_model(teacher)},
        }
    )


def _absolute_file(name: str) -> str:
    return os.path.abspath(name) if name and Path(name).is_file() else name  # noqa: PTH100


def _absolute_model(name: str) -> str:
    """A file, a run directory or a saved folder, also behind ``transformers:``."""
    prefix = PREFIX if name.startswith(PREFIX) else ""
    path = name.removeprefix(prefix)
    return f"{prefix}{os.path.abspath(path)}" if path and Path(path).exists() else name  # noqa: PTH100


def _absolute_source(source: str) -> str:
    """A folder, a pattern of shards, or a local data set behind ``hf:``."""
    kind, colon, _ = source.partition(":")
    if kind == "torchvision" and colon:
        return source
    if kind == "hf" and colon:
        path, configuration = place_of(source)
        mark = "#" if configuration else ""
        return f"hf:{os.path.abspath(path)}{mark}{configuration}" if Path(path).exists() else source  # noqa: PTH100
    return os.path.abspath(source)  # noqa: PTH100
