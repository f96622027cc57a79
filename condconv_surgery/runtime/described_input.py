"""The images that a model of timm, transformers or Ultralytics takes, by what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from condconv_surgery.recipe import InputSpec


def described_input(model: nn.Module, stem: InputSpec) -> InputSpec:
    """``stem``, with what the attributes of ``model`` say otherwise."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        rearranged = any(type(module).__name__ == "SpaceToDepth" for module in model.modules())  # before the stem
        return _of_timm(config, config["input_size"][0] if rearranged else stem.channels, stem)
    if is_of_ultralytics(model):
        return _of_ultralytics(model, stem)
    size = _sides(getattr(getattr(model, "config", None), "image_size", None))
    return stem if size is None else replace(stem, height=size[0], width=size[1])


def _of_timm(config: Mapping[str, Any], channels: int, stem: InputSpec) -> InputSpec:
    _, height, width = config["input_size"]
    return InputSpec(
        channels,
        height,
        width,
        tuple(config.get("mean") or stem.mean),
        tuple(config.get("std") or stem.std),
        config.get("interpolation") or "bicubic",
        config.get("crop_pct") or stem.crop_fraction,
    )


def is_of_ultralytics(model: nn.Module) -> bool:
    """By its own class, or one that a class of ours extends."""
    return any(cls.__module__ == "ultralytics.nn.tasks" for cls in type(model).__mro__)


def _of_ultralytics(model: nn.Module, stem: InputSpec) -> InputSpec:
    """Values in [0, 1] without normalisation; a classifier takes the centre of the image, in the size of training."""
    spec = replace(stem, mean=(0.0,) * stem.channels, std=(1.0,) * stem.channels, crop_fraction=1.0)
    arguments: Any = getattr(model, "args", None)
    arguments = arguments if isinstance(arguments, Mapping) else getattr(arguments, "__dict__", {})
    size = _sides(arguments.get("imgsz")) if arguments.get("task") == "classify" else None
    return spec if size is None else replace(spec, height=size[0], width=size[1])


def _sides(size: object) -> tuple[int, int] | None:
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(sides, (list, tuple)) and len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return sides[0], sides[1]
    return None
