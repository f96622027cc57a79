"""The fastest implementation of each layer, measured on its real shapes instead of estimated."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.conditional_linear import ConditionalLinear
from condconv_surgery.layers.find_layers import conditional_layers
from condconv_surgery.ops.choose_implementation import choose
from condconv_surgery.ops.implementations import legal_implementations
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import Variant
from condconv_surgery.runtime.model_call import arguments_of, call
from condconv_surgery.runtime.modes import in_mode

Layer = ConditionalConv2d[Variant]

WORTH_CHANGING = 0.9
"""An implementation replaces the estimated choice when it takes less than this share of its time: timings of one layer
differ by a few percent from run to run."""


def autotune(model: nn.Module, *arguments: Any, repeats: int = 3) -> dict[str, str]:
    """Set ``implementation`` of each conditional layer to the fastest one on these inputs; returns the layers changed.

    arguments: what ``model`` is called with, or one dict of keyword arguments, at the batch size that matters. In
    training mode forward and backward are measured, in eval mode the forward pass. An artifact does not hold the
    results, since they belong to one machine. ``layer.implementation = "auto"`` undoes one.
    """
    inputs = _inputs(model, arguments_of(model, arguments[0]) if len(arguments) == 1 else arguments)
    changed = {}
    for name, layer in conditional_layers(model).items():
        if layer in inputs:
            layer.implementation = _fastest(layer, *inputs[layer], repeats)
            if layer.implementation != "auto":
                changed[name] = layer.implementation
    return changed


def _inputs(model: nn.Module, arguments: tuple[Any, ...]) -> dict[Layer, tuple[Tensor, Mixture | None]]:
    """The input of each layer's first call, and the mixture if the router of a block computes it.

    The pass runs in eval mode, so that no running statistic changes.
    """
    inputs: dict[Layer, tuple[Tensor, Mixture | None]] = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, ConditionalConv2d)
        x, *mixture = (*args, *kwargs.values())
        inputs.setdefault(layer, (x.detach(), mixture[0] if mixture else None))

    layers = conditional_layers(model).values()
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            call(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _fastest(layer: Layer, x: Tensor, mixture: Mixture | None, repeats: int) -> str:
    training = layer.training
    with in_mode(layer, training=False):
        layer.implementation = "auto"
        with torch.no_grad():
            images = _as_images(layer, x)
            own = layer.route(images) if mixture is None else mixture
        estimated = choose(images, layer.weight, own, layer.geometry)
        # "plain" is legal for a batch of one only and would fail on the next batch
        names = [n for n in legal_implementations(len(images), own, layer.geometry) if n not in ("plain", estimated)]
        seconds = {name: _seconds(layer, x, mixture, name, training, repeats) for name in ("auto", *names)}
        best = min(seconds, key=lambda name: seconds[name])
        return best if seconds[best] < WORTH_CHANGING * seconds["auto"] else "auto"


def _as_images(layer: Layer, x: Tensor) -> Tensor:
    """A layer's input as [B, I, H, W]: the tokens of a Linear are positions, an unbatched image is a batch of one."""
    if isinstance(layer, ConditionalLinear):
        return x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1]).transpose(1, 2).unsqueeze(-1)
    return x if x.dim() == 4 else x.unsqueeze(0)


def _seconds(
    layer: Layer, x: Tensor, mixture: Mixture | None, implementation: str, training: bool, repeats: int
) -> float:
    """The shortest of several runs after a warm-up."""
    layer.implementation = implementation
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            y = layer(x.requires_grad_(training), mixture)
            if training:
                torch.autograd.grad(y.sum(), [x, layer.weight], allow_unused=True)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - start)
    layer.implementation = "auto"
    return min(times[1:])
