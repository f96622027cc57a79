"""Statistics of gates [B, E]: how a layer uses its E experts over B images.

Conventions: natural logarithms (nats), ``0 * log 0 = 0``. Gates are not negative; those of a softmax sum to 1 for each
image, those of sigmoids need not, so what concerns the use of experts is computed from their shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CONSTANT_KERNEL = 0.01
"""Mixed kernels that differ by less than this fraction between images are as good as one kernel."""


def shares(gate: Tensor) -> Tensor:
    """``gate[b,e] / sum_e gate[b,e]``: [B, E] -> [B, E], in the dtype of ``gate``. Zeros where all gates are zero."""
    return gate / gate.sum(1, keepdim=True).clamp_min(torch.finfo(gate.dtype).tiny)


def entropy(share: Tensor) -> Tensor:
    """``H = -sum_e p[e] log p[e]`` in nats, 0 (one expert) to log E (all alike): [..., E] -> [...].

    Gradients are finite at ``p[e] = 0`` too, where those of ``torch.xlogy`` and ``torch.special.entr`` are not: expert
    dropout makes such shares.
    """
    return -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum(-1)


def total_variation(gate: Tensor) -> Tensor:
    """``mean_b (1/2) sum_e |gate[b,e] - mean_b gate[b,e]|``: [B, E] -> []; 0 for gates that are equal for all images.

    For gates that sum to 1 it is the mean distance in total variation from the mean gates, at most 1 - 1/E.
    """
    return 0.5 * (gate - gate.mean(0)).abs().sum(1).mean()


class GateMoments(NamedTuple):
    """Sums over some images of gates [E] and of their products [E, E], in float64, on the device of the gates."""

    images: int
    sums: Tensor
    products: Tensor

    @classmethod
    def of(cls, gate: Tensor) -> GateMoments:
        """The moments of some images' gates [B, E]."""
        exact = gate.detach().double()
        return cls(len(exact), exact.sum(0), exact.T @ exact)

    def with_those_of(self, other: GateMoments) -> GateMoments:
        """The moments over the images of both."""
        return GateMoments(self.images + other.images, self.sums + other.sums, self.products + other.products)

    def cpu(self) -> GateMoments:
        return self._replace(sums=self.sums.cpu(), products=self.products.cpu())

    def kernel_variation(self, experts: Tensor) -> float:
        """How much the mixed kernels ``W_b = sum_e gate[b,e] W_e`` differ between images, relative to their mean.

            sqrt( mean_b |W_b - W|^2 / |W|^2 ),   W = mean_b W_b

        0 for constant gates, and for gates with a constant sum when all experts [E, ...] are equal.
        """
        mean = self.sums / self.images
        covariance = self.products / self.images - torch.outer(mean, mean)
        kernels = experts.detach().flatten(1).to(mean)
        products = kernels @ kernels.T  # [E, E]
        size = (mean @ products @ mean).clamp_min(torch.finfo(products.dtype).tiny)
        return float(((covariance * products).sum().clamp_min(0.0) / size).sqrt())
