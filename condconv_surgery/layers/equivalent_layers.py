"""From a plain layer to a conditional one of the same geometry, and back."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from condconv_surgery.layers.conditional import LAYERS, ConditionalConv2d
from condconv_surgery.layers.conditional_linear import ConditionalLinear
from condconv_surgery.layers.conv2d_subclasses import PaddedConv2d, geometry_of, layer_of_timm
from condconv_surgery.layers.router_base import make_router
from condconv_surgery.layers.weight_forms.weight_standardisation import standardisation_of
from condconv_surgery.ops.geometry import TF_SAME
from condconv_surgery.recipe import Variant


def conditional_like(
    module: nn.Conv2d | nn.Linear, variant: Variant, *, initialise: bool = True
) -> ConditionalConv2d[Variant]:
    """A conditional layer with the geometry, device, dtype, training flag and ``requires_grad`` of ``module``.

    Its router is zeroed, its experts are random; with ``initialise=False`` their memory is not initialised.
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
        _allocate(layer, weight.device)
    layer.train(module.training).requires_grad_(weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(module.bias.requires_grad)  # type: ignore[union-attr]
    return layer


def _allocate(layer: ConditionalConv2d[Variant], device: torch.device) -> None:
    """Uninitialised experts and a zeroed router on ``device``, for a layer made on the meta device."""
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None:
            setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    if layer.router is not None:
        layer.router = make_router(layer.geometry, layer.variant, device=device, dtype=layer.weight.dtype)


def plain_like(layer: ConditionalConv2d[Any]) -> nn.Conv2d | nn.Linear:
    """The plain layer of the same geometry and dtype, without weights (on the meta device).

    Raises ``InputError`` where that is a layer of timm (``layers.conv2d_subclasses``) and timm is not installed.
    """
    g, has_bias, dtype = layer.geometry, layer.bias is not None, layer.exact_dtype
    if isinstance(layer, ConditionalLinear):
        return nn.Linear(g.in_channels, g.out_channels, has_bias, device="meta", dtype=dtype)
    if g.padding != TF_SAME and layer.standardisation is None:
        cls = PaddedConv2d if g.by_side else nn.Conv2d
        return cls(**asdict(g), bias=has_bias, device="meta", dtype=dtype)
    return _plain_of_timm(layer).to(dtype)


def _plain_of_timm(layer: ConditionalConv2d[Any]) -> nn.Conv2d:
    g, standardisation = layer.geometry, layer.standardisation
    same = g.padding == TF_SAME
    shape = (g.in_channels, g.out_channels, g.kernel_size, g.stride)
    options: dict[str, Any] = {"dilation": g.dilation, "groups": g.groups, "bias": layer.bias is not None}
    name = "Conv2d" if standardisation is None else "StdConv2d"
    if standardisation is not None:
        options["eps"] = standardisation.eps
        if standardisation.gain is not None:
            name = f"Scaled{name}"
            options["gamma"] = standardisation.scale * math.prod(g.weight_shape[1:]) ** 0.5
    with torch.device("meta"):  # layers of older versions of timm take neither device nor dtype
        plain = layer_of_timm(f"{name}Same" if same else name)(*shape, padding=0 if same else g.padding, **options)  # type: ignore[arg-type]
    if same and standardisation is not None:
        plain.same_pad = True  # type: ignore[assignment]
    return plain
