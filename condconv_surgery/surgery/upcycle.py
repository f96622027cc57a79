"""Make a conditional layer that computes the same function as a trained one.

    experts[e] = W + eps_e,    sum_e eps_e = 0,    router zeroed

A zeroed router mixes all experts equally for every input, so the mixed kernel is ``W`` exactly, for any ``eps``.
Without ``eps`` equal experts would get equal gradients for ever; with it they separate in the first step.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from condconv_surgery.layers import ConditionalConv2d, conditional_like
from condconv_surgery.recipe import Upcycling, Variant

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@torch.no_grad()
def upcycle(
    module: nn.Conv2d | nn.Linear, variant: Variant, upcycling: Upcycling, name: str = ""
) -> ConditionalConv2d[Variant]:
    """The conditional layer for ``module``, whose weight is copied into every expert. (``move_hooks`` moves hooks.)

    name: makes the noise of one layer independent of which others are converted.
    """
    layer = conditional_like(module, variant, initialise=False)
    weight = module.weight.detach().view(layer.geometry.weight_shape)
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = upcycling.diversity * _scale(weight)
    noise = _zero_sum_noise(exact, variant.experts, upcycling.seed ^ zlib.crc32(name.encode()))
    for expert, own in zip(layer.weight, noise, strict=True):
        expert.copy_(own.to(weight.device).mul_(scale).add_(exact))  # [O, I/G, kh, kw]
    if layer.bias is not None and module.bias is not None:
        layer.bias.copy_(module.bias.detach().expand_as(layer.bias))
    return layer


def _zero_sum_noise(like: Tensor, experts: int, seed: int) -> Tensor:
    """[E, *like.shape] in the dtype of ``like``: standard normal minus the mean over the experts.

    Drawn in float32 on the CPU, so equal for every device and dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(experts, *like.shape, generator=generator).to(like.dtype)
    mean = torch.zeros(like.shape, dtype=like.dtype)
    for own in noise:  # a third of the time of ``mean``
        mean.add_(own, alpha=1.0 / experts)
    return noise.sub_(mean)


def _scale(weight: Tensor) -> float:
    """The standard deviation of the weight; of a fresh layer's when the weight is constant (zero-initialised)."""
    std = 0.0 if weight.is_meta else float(weight.float().std(correction=0))
    if std > 0 and math.isfinite(std):
        return std
    return 1.0 / math.sqrt(3.0 * math.prod(weight.shape[1:]))


def has_hooks(module: nn.Module) -> bool:
    """Has ``module`` a forward or backward hook?"""
    return any(getattr(module, kind) for kind in _HOOKS)


def move_hooks(module: nn.Module, layer: nn.Module) -> None:
    """Give ``layer`` the hooks of the ``module`` that it replaces, and ``module`` those of ``layer``.

    They exchange the dictionaries themselves, which the handles of the hooks refer to: ``handle.remove()`` works on.
    """
    for kind in (*_HOOKS, "_is_full_backward_hook"):
        old, new = getattr(module, kind), getattr(layer, kind)
        setattr(layer, kind, old)
        setattr(module, kind, new)
