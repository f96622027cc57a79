"""What it takes to run someone's model: its input, its device, its mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from condconv_surgery.recipe import InputSpec, recipe_of


def input_spec_of(model: nn.Module) -> InputSpec:
    """What the model itself says of its input: its recipe, timm's configuration, else 224x224 with its own channels."""
    recipe = recipe_of(model)
    if recipe is not None:
        return recipe.input
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")  # timm's models carry their own
    if size is not None:
        return InputSpec(*size)
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return InputSpec(channels=stem.in_channels if stem is not None else 3)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in one mode inside the block; afterwards each module in its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """``torch.no_grad``; ``torch.inference_mode`` where tensors of the model are of that mode and change only in it."""
    made_so = any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    with torch.inference_mode() if made_so else torch.no_grad():
        yield
