"""Which way is taken when, from shapes, device and mode alone: no timing, nothing that stops a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.layers.cost import estimate
from condconv_surgery.layers.mixture import ConvGeometry, Mixture
from condconv_surgery.layers.ways import legal_ways, one_kernel_for_all

NEEDS_THIS_PACKAGE = "blocks"
"""The way with an operator of our own: an exported program must run where this package is not installed."""

ONE_BY_ONE = ("loop", "plain")
"""Ways that unroll over the batch, or hold for a batch of one."""


def choose(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    """The name of the way to take for ``x`` [B, I, H, W]: that of the least ``estimate``.

    Never a comparison of the batch with anything but 0 and 1, so that one compiled graph serves every batch.
    """
    batch = x.shape[0]
    if batch == 0:
        return "static"
    if batch == 1:
        return "static" if one_kernel_for_all(mixture) and not scales_belong_in_the_kernel(x, geometry) else "plain"
    ways = candidates(mixture, geometry, torch.compiler.is_exporting())
    best = ways[0]
    for way in ways[1:]:  # not min(): a compiler that keeps sizes symbolic cannot take it
        if _seconds(way, x, experts, mixture, geometry) < _seconds(best, x, experts, mixture, geometry):
            best = way
    return best


def candidates(mixture: Mixture, geometry: ConvGeometry, exporting: bool) -> list[str]:
    """The ways that ``choose`` estimates for a batch.

    ``blocks`` is ``grouped``, ``loop`` and ``bmm``, whichever is faster, without their memory: of the ways that mix
    kernels only it is worth an estimate, unless the program is to be exported.
    """
    legal = legal_ways(2, mixture, geometry)
    if exporting:
        return [way for way in legal if way != NEEDS_THIS_PACKAGE and way not in ONE_BY_ONE]
    return [way for way in legal if way in (NEEDS_THIS_PACKAGE, "static")]


def _seconds(way: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> float:
    return estimate(way, x, experts.shape[0], mixture, geometry)


def scales_belong_in_the_kernel(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether ``in_scale`` and ``out_scale`` touch fewer numbers in a kernel than in the activations of a sample.

    In the kernel they also cost no memory: nothing of the size of an activation is kept for their gradients.
    """
    return geometry.weight_numel <= geometry.activations(x)
