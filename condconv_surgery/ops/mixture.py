"""The mixture of each sample: what a router returns and ``ops.conditional_conv2d`` takes.

The alphabet of shapes used throughout: B batch, E experts, I/O channels in/out, G groups, kh kw kernel, H W positions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Mixture(NamedTuple):
    """The kernel and the scales of each sample.

        W_b = spatial_b * sum_e gate[b,e] * experts[e]
        y_b = out_scale_b * conv(in_scale_b * x_b, W_b) + sum_e gate[b,e] * bias[e]

    ``None`` stands for all ones. A ``gate`` of ``None`` is possible only with one expert.
    """

    gate: Tensor | None = None  # [B, E]
    spatial: Tensor | None = None  # [B, kh, kw]
    in_scale: Tensor | None = None  # [B, I]
    out_scale: Tensor | None = None  # [B, O]

    def for_images_of(self, other: Mixture) -> Mixture:
        """This mixture of one image for each image of ``other``, on its device and in its dtype."""
        pairs = zip(self, other, strict=True)
        return Mixture(*(own if own is None or part is None else own.to(part).expand_as(part) for own, part in pairs))


def same_kernel_for_all(mixture: Mixture) -> bool:
    """Whether all samples share one kernel: what differs is at most scales, which can act on the activations."""
    return mixture.gate is None and mixture.spatial is None
