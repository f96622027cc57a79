"""From a plain layer to its conditional twin, and from a model to its conditional layers."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers.conditional import LAYERS, ConditionalConv2d
from condconv_surgery.layers.conditional_linear import ConditionalLinear
from condconv_surgery.layers.conv2d_subclasses import geometry_of, layer_of_timm
from condconv_surgery.layers.router import Router, make_router
from condconv_surgery.layers.weight_standardisation import standardisation_of
from condconv_surgery.ops.geometry import TF_SAME
from condconv_surgery.recipe import Variant


def conditional_like(
    module: nn.Conv2d | nn.Linear, variant: Variant, *, initialise: bool = True
) -> ConditionalConv2d[Variant]:
    """A conditional layer with the geometry, device, dtype, training flag and ``requires_grad`` of ``module``.

    Its router is zeroed, its experts freshly initialised; with ``initialise=False`` they hold anything, to be filled.
    """
    weight, has_bias = module.weight, module.bias is not None
    device = weight.device if initialise else torch.device("meta")
    layer: ConditionalConv2d[Variant]
    if isinstance(module, nn.Linear):
        layer = ConditionalLinear(
            module.in_features, module.out_features, has_bias, device, weight.dtype, variant=variant
        )
    else:
        layer = LAYERS.get(type(variant), ConditionalConv2d)(
            **asdict(geometry_of(module)), bias=has_bias, device=device, dtype=weight.dtype, variant=variant
        )
        layer.standardisation = standardisation_of(module)
    if not initialise:
        _give_memory(layer, weight.device)
    layer.train(module.training).requires_grad_(weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(module.bias.requires_grad)  # type: ignore[union-attr]
    return layer


def _give_memory(layer: ConditionalConv2d[Variant], device: torch.device) -> None:
    """Experts on ``device``, whatever is there, and a neutral router, for a layer made on the meta device."""
    for name in ("weight", "bias"):
        empty = getattr(layer, name)
        if empty is not None:
            setattr(layer, name, nn.Parameter(torch.empty_like(empty, device=device)))
    if layer.router is not None:
        layer.router = make_router(layer.geometry, layer.variant, device=device, dtype=layer.weight.dtype)


def plain_like(layer: ConditionalConv2d[Any]) -> nn.Conv2d | nn.Linear:
    """The plain layer that ``layer`` stands for: its geometry and dtype, without weights (on the meta device).

    Raises ``InputError`` where that is a layer of timm (``layers.conv2d_subclasses``) and timm is not installed.
    """
    g, has_bias, dtype = layer.geometry, layer.bias is not None, layer.weight.dtype
    if isinstance(layer, ConditionalLinear):
        return nn.Linear(g.in_channels, g.out_channels, has_bias, device="meta", dtype=dtype)
    if g.padding != TF_SAME and layer.standardisation is None:
        return nn.Conv2d(**asdict(g), bias=has_bias, device="meta", dtype=dtype)
    return _plain_of_timm(layer).to(dtype)


def _plain_of_timm(layer: ConditionalConv2d[Any]) -> nn.Conv2d:
    g, standardisation = layer.geometry, layer.standardisation
    same = g.padding == TF_SAME
    shape = (g.in_channels, g.out_channels, g.kernel_size, g.stride)
    rest: dict[str, Any] = {"dilation": g.dilation, "groups": g.groups, "bias": layer.bias is not None}
    name = "Conv2d" if standardisation is None else "StdConv2d"
    if standardisation is not None:
        rest["eps"] = standardisation.eps
        if standardisation.gain is not None:
            name = f"Scaled{name}"
            rest["gamma"] = standardisation.scale * math.prod(g.weight_shape[1:]) ** 0.5
    with torch.device("meta"):  # older ones of timm take neither device nor dtype
        plain = layer_of_timm(f"{name}Same" if same else name)(*shape, padding=0 if same else g.padding, **rest)
    if same and standardisation is not None:
        plain.same_pad = True  # type: ignore[assignment]
    return plain


def conditional_layers(model: nn.Module) -> dict[str, ConditionalConv2d[Variant]]:
    """Every conditional layer of a model by its first name, each once however often it is shared."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ConditionalConv2d)}


def routers(model: nn.Module) -> dict[str, Router]:
    """Every router of a model once, by the first name of what it routes for: a conditional layer, or a block."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, Router))
    return {name.rpartition(".")[0]: router for name, router in found}


def set_temperature(model: nn.Module, value: float) -> int:
    """Set the temperature of every router that has one; returns how many have."""
    if not 0 < value < float("inf"):
        raise InputError(f"The temperature is {value!r}.", "It must be a positive number.", "30.0")
    buffers = [getattr(router, "temperature", None) for router in routers(model).values()]
    present = [buffer for buffer in buffers if buffer is not None]
    for buffer in present:
        buffer.fill_(value)
    return len(present)
