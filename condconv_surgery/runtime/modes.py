"""What it takes to run a model: its input size, an example, its device, train or eval mode, no gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from condconv_surgery.recipe import InputSpec, recipe_of
from condconv_surgery.runtime.described_input import described_input
from condconv_surgery.runtime.model_call import arguments_of, image_arguments

_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def input_spec_of(model: nn.Module) -> InputSpec:
    """The input in the model's recipe; else what a model of timm, transformers or Ultralytics says of itself, else
    224x224 in ImageNet's normalisation; the channels of its first layer."""
    recipe = recipe_of(model)
    return described_input(model, input_of_stem(model)) if recipe is None else recipe.input


def input_of_stem(model: nn.Module) -> InputSpec:
    """224 pixels, and the channels that the first convolution takes."""
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return InputSpec(channels=stem.in_channels) if stem is not None else InputSpec()


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first parameter of floating point; float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def example_arguments(model: nn.Module, example: Any = None) -> tuple[Any, ...]:
    """The arguments of a forward pass: the example's (``arguments_of``), or two random images of the size that the
    model expects."""
    if example is not None:
        return arguments_of(model, example)
    spec = input_spec_of(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, spec.channels, spec.height, spec.width, generator=generator)
    return image_arguments(model, x.to(device_of(model), dtype_of(model)))


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the whole model to one mode inside the block; each module gets its own mode back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        restore_modes(before)


def restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Set each module to its mode, parents before children.

    A class with a ``train`` of its own may switch more than the flag (the graph of torchvision's feature extractors),
    so it is called where the mode changes; the flags are set last, since it may set those of other modules.
    """
    for module, mode in modes:
        if module.training != mode and type(module).train is not nn.Module.train:
            module.train(mode)
    for module, mode in modes:
        module.training = mode


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether forward hooks of somebody else than torch, or this package, see the calls of its modules."""
    hooks = [hook for m in model.modules() for kind in _FORWARD_HOOKS for hook in getattr(m, kind).values()]
    return any(_home_of(hook) not in ("torch", "condconv_surgery") for hook in hooks)


@contextmanager
def without_forward_hooks(model: nn.Module) -> Iterator[None]:
    """Inside the block no forward hook of any module of ``model`` is called."""
    kept = [(getattr(m, kind), dict(getattr(m, kind))) for m in model.modules() for kind in _FORWARD_HOOKS]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def _home_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0]


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """``torch.no_grad``; ``torch.inference_mode`` for a model of inference tensors, which change only in that mode."""
    has_inference_tensors = any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    with torch.inference_mode() if has_inference_tensors else torch.no_grad():
        yield
