"""Make a conditional layer that computes the same function as a trained one.

Two kinds of starts do that exactly (``recipe.Upcycling``):

    experts[e] = W            any router whose gates sum to 1 for every input ("antithetic" sigmoids, "softmax")
    experts[e] = W + eps_e    sum_e eps_e = 0, router zeroed ("noise")

With the first, gates vary over images from the start, so each expert has a gradient of its own, and after one step the
router's gradient shows which experts should be used more. With the second, the router's gradient is proportional to the
noise, and differences between experts to gates that do not vary yet.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, Router, conditional_like
from condconv_surgery.layers.router_base import router_class
from condconv_surgery.layers.start_directions import Features, assumed_features
from condconv_surgery.recipe import Upcycling, Variant
from condconv_surgery.surgery.observe.pooled_features import FEWEST_IMAGES

DIVERSITY = 0.1
"""Default standard deviation of the noise, as a fraction of the weight's."""

ASSUMED_VARIATION = 0.5
"""Standard deviation over images of a channel's pooled feature, as a fraction of the features' root mean square, where
no images are given."""

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
    module: nn.Conv2d | nn.Linear,
    variant: Variant,
    upcycling: Upcycling,
    name: str = "",
    features: Tensor | None = None,
) -> ConditionalConv2d[Variant]:
    """The conditional layer for ``module``, which computes the same. (``move_hooks`` moves hooks.)

    name: makes the random numbers of one layer independent of which others are converted.
    features: see ``start_router``.
    Raises ``InputError`` for a start that the variant does not support.
    """
    layer = conditional_like(module, variant, initialise=False)
    start = start_of(variant, upcycling)
    weight = module.weight.detach().view(layer.geometry.weight_shape)
    if start == "noise":
        _fill_with_noise(layer.weight, weight, upcycling, name)
    else:
        layer.weight.copy_(weight.expand_as(layer.weight))
        if layer.router is not None:
            start_router(layer.router, layer.geometry.in_channels, upcycling, name, features)
    if layer.bias is not None and module.bias is not None:
        layer.bias.copy_(module.bias.detach().expand_as(layer.bias))
    return layer


def start_of(variant: Variant, upcycling: Upcycling) -> str:
    """The start of ``upcycling`` for a variant, ``"auto"`` resolved. Raises ``InputError`` for one not supported."""
    own = router_class(variant).best_start(variant)
    start = own if upcycling.start == "auto" else upcycling.start
    if start not in (own, "noise"):
        raise InputError(
            f'start="{start}" is not supported by {type(variant).__name__}.',
            f"Its router supports: {', '.join(dict.fromkeys((own, 'noise')))}.",
            'start="auto"',
        )
    if start != "noise" and upcycling.diversity is not None:
        raise InputError(
            f'diversity={upcycling.diversity} with the start "{start}".',
            "It is the size of the noise that tells experts apart; this start tells them apart by their gates.",
            'start="noise", or leave diversity= out',
        )
    return start


@torch.no_grad()
def start_router(router: Router, channels: int, upcycling: Upcycling, name: str, features: Tensor | None) -> None:
    """Gates that vary over images and sum to 1 for any input, in place.

    features: [N, I], pooled, of N images; the logits start along their principal directions. Of fewer than
    ``FEWEST_IMAGES`` (the example's) only mean and size are used: channels are assumed to vary independently, each by
    ``ASSUMED_VARIATION`` of the root mean square of all, and directions are random. ``None``: mean 0, deviation 1.
    """
    if next(router.parameters()).is_meta:
        return
    generator = torch.Generator().manual_seed(_seed(upcycling, name))
    if features is None or not bool(features.isfinite().all()):
        known = assumed_features(channels, generator)
    elif len(features) < FEWEST_IMAGES:
        size = float(features.square().mean().sqrt())
        known = assumed_features(channels, generator, features.mean(0), ASSUMED_VARIATION * size or 1.0)
    else:
        known = Features(features, observed=True)
    router.start_(known, upcycling.spread, generator)


def _seed(upcycling: Upcycling, name: str) -> int:
    return upcycling.seed ^ zlib.crc32(name.encode())


def _fill_with_noise(experts: Tensor, weight: Tensor, upcycling: Upcycling, name: str) -> None:
    """``experts[e] = W + eps_e``: [E, O, I/G, kh, kw], in place."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (DIVERSITY if upcycling.diversity is None else upcycling.diversity) * _scale(weight)
    noise = _zero_sum_noise(exact, len(experts), _seed(upcycling, name))
    for expert, own in zip(experts, noise, strict=True):
        expert.copy_(own.to(weight.device).mul_(scale).add_(exact))  # [O, I/G, kh, kw]


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
