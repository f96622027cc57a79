"""Which way is taken when, from shapes, device and mode alone: no timing, nothing that stops a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.layers.mixture import ConvGeometry, Mixture
from condconv_surgery.layers.ways import one_kernel_for_all

MOST_POSITIONS_TO_MIX = 256
"""Up to this many (experts x output positions) a dense convolution with E*O filters costs less than B*G groups."""


def choose(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    """The name of the way to take for ``x`` [B, I, H, W].

    Never a comparison of the batch with anything but 0 and 1, so that one compiled graph serves every batch.
    """
    batch = x.shape[0]
    if batch == 0:
        return "static"
    if batch == 1:
        return "static" if one_kernel_for_all(mixture) and not scales_belong_in_the_kernel(x, geometry) else "plain"
    if torch.compiler.is_exporting():
        return _exportable(x, experts, mixture, geometry)
    if one_kernel_for_all(mixture) and not _cheaper_as_a_matrix(x, geometry):
        return "static"
    return "blocks"


def scales_belong_in_the_kernel(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether ``in_scale`` and ``out_scale`` touch fewer numbers in a kernel than in the activations of a sample.

    In the kernel they also cost no memory: nothing of the size of an activation is kept for their gradients.
    """
    return geometry.weight_numel <= geometry.activations(x)


def _exportable(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    """A way made of torch's own operators: an exported program must run where this package is not installed."""
    if one_kernel_for_all(mixture):
        return "static"
    if geometry.pointwise:
        return "bmm"
    few = experts.shape[0] * geometry.positions(x) <= MOST_POSITIONS_TO_MIX
    return "outputs" if few and mixture.spatial is None and not geometry.depthwise else "grouped"


def _cheaper_as_a_matrix(x: Tensor, geometry: ConvGeometry) -> bool:
    """A 1x1 layer whose scales fit into its kernel: matrix products beat a convolution that has none."""
    return geometry.pointwise and scales_belong_in_the_kernel(x, geometry)
