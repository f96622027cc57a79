"""Measure once instead of estimating: the fastest way of each layer on its real shapes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.conditional_linear import ConditionalLinear
from condconv_surgery.layers.registry import conditional_layers
from condconv_surgery.ops.choose_implementation import choose
from condconv_surgery.ops.implementations import legal_implementations
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import Variant
from condconv_surgery.runtime.modes import in_mode

Layer = ConditionalConv2d[Variant]

WORTH_CHANGING = 0.9
"""A way is kept when it takes less than this share of the chosen one's time: timings of one layer differ by a few
percent from run to run."""


def autotune(model: nn.Module, *arguments: Any, repeats: int = 3) -> dict[str, str]:
    """Set ``execution`` of each conditional layer to its fastest way on these inputs; returns the layers changed.

    arguments: what ``model`` is called with, at the batch size that matters. Training mode measures forward and
    backward, eval mode the forward pass. The winners are attributes of the layers in memory; an artifact never holds
    them, since they belong to one machine. ``layer.implementation = "auto"`` undoes a choice.
    """
    inputs = _inputs(model, arguments)
    changed = {}
    for name, layer in conditional_layers(model).items():
        if layer in inputs:
            layer.implementation = _fastest(layer, *inputs[layer], repeats)
            if layer.implementation != "auto":
                changed[name] = layer.implementation
    return changed


def _inputs(model: nn.Module, arguments: tuple[Any, ...]) -> dict[Layer, tuple[Tensor, Mixture | None]]:
    """The input of each layer's first call, and the mixture where the router of a block gives it.

    The pass is made in eval mode: no running statistic moves.
    """
    found: dict[Layer, tuple[Tensor, Mixture | None]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, ConditionalConv2d)
        given = (*args, *kwargs.values())
        found.setdefault(layer, (given[0].detach(), given[1] if len(given) > 1 else None))

    layers = conditional_layers(model).values()
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _fastest(layer: Layer, x: Tensor, given: Mixture | None, repeats: int) -> str:
    training = layer.training
    with in_mode(layer, training=False):
        layer.implementation = "auto"
        with torch.no_grad():
            images = _as_images(layer, x)
            mixture = layer.route(images) if given is None else given
        legal = legal_implementations(len(images), mixture, layer.geometry)
        # what is legal for a batch of one alone would fail on the next batch
        candidates = [way for way in legal if way != "plain"]
        chosen = choose(images, layer.weight, mixture, layer.geometry)
        ways = ["auto", *(way for way in candidates if way != chosen)]
        seconds = {way: _seconds(layer, x, given, way, training, repeats) for way in ways}
        best = min(seconds, key=lambda way: seconds[way])
        return best if seconds[best] < WORTH_CHANGING * seconds["auto"] else "auto"


def _as_images(layer: Layer, x: Tensor) -> Tensor:
    """A layer's input as [B, I, H, W]: a Linear's tokens are pixels, an unbatched picture is a batch of one."""
    if isinstance(layer, ConditionalLinear):
        return x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1]).transpose(1, 2).unsqueeze(-1)
    return x if x.dim() == 4 else x.unsqueeze(0)


def _seconds(layer: Layer, x: Tensor, given: Mixture | None, way: str, training: bool, repeats: int) -> float:
    """The shortest of several runs, after one that warms up."""
    layer.implementation = way
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            y = layer(x.requires_grad_(training), given)
            if training:
                torch.autograd.grad(y.sum(), [x, layer.weight], allow_unused=True)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - start)
    layer.implementation = "auto"
    return min(times[1:])
