"""The images that a model of transformers takes, from the ``preprocessor_config.json`` beside its weights."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from condconv_surgery.recipe import InputSpec

FILE = "preprocessor_config.json"

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""

_CONVNEXT_EDGE = 384
"""Below this size ConvNeXt's processor resizes to ``size / crop_pct`` and crops; from it on it only resizes."""

_LEVIT_SHARE = 224 / 256
"""LeViT's processor resizes to ``size`` over this."""

_LOG = logging.getLogger("condconv_surgery")


def input_of_processor(name: str, model: InputSpec) -> InputSpec:
    """The input that the processor of a folder, or of a model in the cache, makes; ``model``, where there is none.

    Processors that stretch an image to a rectangle are taken as those that crop it.
    """
    values = _read(name)
    if values is None:
        return model
    height, width, crop = _size(values, model)
    mean, std = _normalisation(values)
    if _flips_channels(values):
        _LOG.warning(
            "%s: its processor gives channels in the order BGR, images are read in RGB here; for equal outputs: "
            "weight.data = weight.data.flip(1) of its first convolution",
            name,
        )
    return replace(
        model,
        height=height,
        width=width,
        mean=mean,
        std=std,
        interpolation=_INTERPOLATIONS.get(values.get("resample", 2), "bilinear"),
        crop_fraction=crop,
    )


def _normalisation(values: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of values in [0, 1]: the processor computes (pixel * factor - offset - mean) / std of bytes.

    EfficientNet's divides by std once more (``include_top``); MobileViT's never normalises.
    """
    normalised = values.get("do_normalize", True) and not _is_of(values, "MobileViT")
    means = values.get("image_mean") or [0.5] * 3 if normalised else [0.0] * 3
    stds = values.get("image_std") or [0.5] * 3
    power = int(bool(normalised)) + int(bool(values.get("include_top", _is_of(values, "EfficientNet"))))
    factor = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor  # 1 / 255 is stored rounded
    offset = 1.0 if values.get("rescale_offset", False) else 0.0
    return tuple((mean + offset) / factor for mean in means), tuple(std**power / factor for std in stds)


def _flips_channels(values: dict[str, Any]) -> bool:
    return bool(values.get("do_flip_channel_order", _is_of(values, "MobileViT")))


def _is_of(values: dict[str, Any], kind: str) -> bool:
    """Whether the processor is that of a kind of model; of old files, the feature extractor."""
    named = values.get("image_processor_type") or values.get("feature_extractor_type") or ""
    return str(named).startswith(kind)


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
        share = _LEVIT_SHARE if _is_of(values, "Levit") else values.get("crop_pct") or 1.0
        return (*crop, min(crop[0] / int(size[0] / share + 1e-6), 1.0))
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
