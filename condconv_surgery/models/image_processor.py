"""The images that a model of transformers takes, from the ``preprocessor_config.json`` beside its weights."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from condconv_surgery.recipe import InputSpec

FILE = "preprocessor_config.json"

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""

_CONVNEXT_EDGE = 384
"""Below this size ConvNeXt's processor resizes to ``size / crop_pct`` and crops; from it on it only resizes."""


def input_of_processor(name: str, model: InputSpec) -> InputSpec:
    """The input that the processor of a folder, or of a model in the cache, makes; ``model``, where there is none.

    Processors that stretch an image to a rectangle are taken as those that crop it.
    """
    values = _read(name)
    if values is None:
        return model
    height, width, crop = _size(values, model)
    normalised = values.get("do_normalize", True)
    mean = values.get("image_mean") or [0.5] * 3 if normalised else [0.0] * 3
    std = values.get("image_std") or [0.5] * 3 if normalised else [1.0] * 3
    return replace(
        model,
        height=height,
        width=width,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=_INTERPOLATIONS.get(values.get("resample", 2), "bilinear"),
        crop_fraction=crop,
    )


def _read(name: str) -> dict[str, Any] | None:
    if Path(name).is_dir():
        path: Any = Path(name) / FILE
    else:
        try:
            path = importlib.import_module("huggingface_hub").try_to_load_from_cache(name, FILE)
        except ValueError:  # no name of a repository
            return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, (str, Path)) else None
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _size(values: dict[str, Any], model: InputSpec) -> tuple[int, int, float]:
    """Height, width and the share of the resized image that they are."""
    size, crop = _sides(values.get("size")), _sides(values.get("crop_size"))
    if size is None:
        return (*(crop or (model.height, model.width)), model.crop_fraction if crop is None else 1.0)
    if crop is not None and values.get("do_center_crop", False):
        return (*crop, min(crop[0] / size[0], 1.0))
    small = values.get("crop_pct") if size[0] < _CONVNEXT_EDGE else None
    return (*size, small or 1.0)


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if not isinstance(size, dict):
        return None
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    edge = size.get("shortest_edge")
    return None if edge is None else (edge, edge)
