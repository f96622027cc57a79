"""Which way is taken when, from shapes, device and mode alone: no timing, nothing that stops a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.ops.backends import cpp as native
from condconv_surgery.ops.bounded_cache import remember
from condconv_surgery.ops.cost_model import estimate, scales_belong_in_the_kernel
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations import legal_ways, one_kernel_for_all
from condconv_surgery.ops.implementations.per_sample_conv import counts_as_cpu
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.tracing_state import is_watched

NEEDS_THIS_PACKAGE = "blocks"
"""The way with an operator of our own: an exported program must run where this package is not installed."""

ONE_BY_ONE = ("loop", "plain")
"""Ways that unroll over the batch, or hold for a batch of one."""

MOST_SCALED = 2
"""Where scales are all that is mixed the compiled code scales a kernel of up to so many times the numbers of a sample's
activations, rather than these: 0.7 to 1.0 of the time for 1x1 layers at 14 px, 1.0 to 1.3 at 7 px, in either mode."""

_known: dict[tuple[object, ...], str] = {}


def choose(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    """The name of the way to take for ``x`` [B, I, H, W]: that of the least ``estimate``.

    Never a comparison of the batch with anything but 0 and 1, so that one compiled graph serves every batch.
    """
    batch = x.shape[0]
    if batch == 0:
        return "static"
    if batch == 1:
        return "static" if one_kernel_for_all(mixture) and not scales_belong_in_the_kernel(x, geometry) else "plain"
    ways = candidates(mixture, geometry, torch.compiler.is_exporting(), counts_as_cpu(x))
    if len(ways) == 1:
        return ways[0]
    if _scales_alone(mixture) and native.fits(x, experts, geometry.stride, geometry.groups):
        few = geometry.weight_numel <= MOST_SCALED * geometry.activations(x)
        return NEEDS_THIS_PACKAGE if few else "static"
    if is_watched():  # sizes may be symbolic
        return _cheapest(ways, x, experts, mixture, geometry)
    present = tuple(part is not None for part in mixture)
    key = (x.device.type, x.dtype, x.shape[2:], experts.shape[0], present, geometry)
    return _known.get(key) or remember(_known, key, _cheapest(ways, x, experts, mixture, geometry))


def _cheapest(ways: list[str], x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    seconds = [estimate(way, x, experts.shape[0], mixture, geometry) for way in ways]
    best = 0
    for i in range(1, len(ways)):  # not min(): a compiler that keeps sizes symbolic cannot take it
        if seconds[i] < seconds[best]:
            best = i
    return ways[best]


def _scales_alone(mixture: Mixture) -> bool:
    """Nothing but ``in_scale`` and ``out_scale``, of which there is one at least."""
    return one_kernel_for_all(mixture) and not (mixture.in_scale is None and mixture.out_scale is None)


def candidates(mixture: Mixture, geometry: ConvGeometry, exporting: bool, on_cpu: bool = True) -> list[str]:
    """The ways that ``choose`` estimates for a batch.

    ``blocks`` is ``grouped``, ``loop`` and ``bmm``, whichever is faster, without their memory: of the ways that mix
    kernels only it is worth an estimate, unless the program is to be exported. On a GPU so are those that mix
    activations: there work costs less than memory.
    """
    legal = legal_ways(2, mixture, geometry)
    if exporting:
        return [way for way in legal if way != NEEDS_THIS_PACKAGE and way not in ONE_BY_ONE]
    worth = (NEEDS_THIS_PACKAGE, "static") if on_cpu else (NEEDS_THIS_PACKAGE, "static", "outputs", "inputs")
    return [way for way in legal if way in worth]
