"""A trained layer becomes a conditional one that computes the same function.

    experts[e] = W + eps_e,    sum_e eps_e = 0,    router zeroed

A zeroed router mixes all experts equally for every input, so the mixed kernel is ``W`` exactly, for any ``eps``.
Without ``eps`` equal experts would get equal gradients for ever; with it they separate in the first step.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from condconv_surgery.layers import ConditionalConv2d, conditional_like
from condconv_surgery.recipe import Upcycling, Variant


@torch.no_grad()
def upcycle(
    module: nn.Conv2d | nn.Linear, variant: Variant, upcycling: Upcycling, name: str = ""
) -> ConditionalConv2d[Variant]:
    """The conditional twin of ``module``: its hooks move along, its weight is copied into every expert.

    name: makes the noise of one layer independent of which others are converted.
    """
    layer = conditional_like(module, variant)
    weight = module.weight.detach().view(layer.geometry.weight_shape)
    scale = upcycling.diversity * _scale(weight)
    noise = _zero_sum_noise(weight, variant.experts, upcycling.seed ^ zlib.crc32(name.encode()))
    for expert, own in zip(layer.weight, noise, strict=True):
        expert.copy_(weight.double() + scale * own)  # [O, I/G, kh, kw]
    if layer.bias is not None and module.bias is not None:
        layer.bias.copy_(module.bias.detach().expand_as(layer.bias))
    _move_hooks(module, layer)
    return layer


def _zero_sum_noise(weight: Tensor, experts: int, seed: int) -> Iterator[Tensor]:
    """For each expert in turn, [*weight.shape] in float64: standard normal minus the mean over the experts.

    Drawn on the CPU, so equal on any device; one at a time, since all in float64 are twice the size of the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(experts, *weight.shape, generator=generator)
    mean = torch.zeros(weight.shape, dtype=torch.float64)
    for own in noise:  # a third of the time of ``mean(dtype=float64)``
        mean.add_(own, alpha=1.0 / experts)
    return ((own.double() - mean).to(weight.device) for own in noise)


def _scale(weight: Tensor) -> float:
    """The standard deviation of the weight; of a fresh layer's when the weight is constant (zero-initialised)."""
    std = 0.0 if weight.is_meta else float(weight.float().std(correction=0))
    if std > 0 and math.isfinite(std):
        return std
    return 1.0 / math.sqrt(3.0 * math.prod(weight.shape[1:]))


def _move_hooks(module: nn.Module, layer: nn.Module) -> None:
    for kind in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        getattr(layer, kind).update(getattr(module, kind))
    layer._is_full_backward_hook = module._is_full_backward_hook
