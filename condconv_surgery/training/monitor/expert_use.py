"""How a model uses its experts on the validation images, and whether its routing has an effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condconv_surgery.layers import Mixture
from condconv_surgery.layers.find_layers import routed_layers
from condconv_surgery.layers.gate_statistics import CONSTANT_KERNEL, GateMoments, entropy, shares
from condconv_surgery.training.distributed.fsdp import full_tensor
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gate_regularization import RouterHooks


@dataclass
class ExpertUse:
    """Use of the experts of a layer: sums over images of the gate shares and of their entropy; moments of the gates.

    They stay on the device until they are read.
    """

    share_sum: Tensor  # [E]
    entropy_sum: Tensor | float = 0.0
    moments: GateMoments | None = None

    def add(self, gate: Tensor) -> None:
        """Add the gates [B, E] of some images."""
        p = shares(gate.detach().float())
        self.share_sum = self.share_sum + p.sum(0)
        self.entropy_sum = self.entropy_sum + entropy(p).sum().double()
        moments = GateMoments.of(gate)
        self.moments = moments if self.moments is None else self.moments.with_those_of(moments)

    @property
    def count(self) -> int:
        """Number of images."""
        return 0 if self.moments is None else self.moments.images

    @property
    def use(self) -> list[float]:
        """Mean share of each expert."""
        return [share / self.count for share in self.share_sum.tolist()]

    @property
    def entropy(self) -> float:
        """Mean entropy of an image's shares, as a fraction of log E."""
        return float(self.entropy_sum) / self.count / math.log(len(self.share_sum))

    def kernel_variation(self, experts: Tensor) -> float:
        """How much the kernels mixed of ``experts`` differ between the images (``GateMoments``)."""
        return 0.0 if self.moments is None else self.moments.kernel_variation(experts)

    def cpu(self) -> ExpertUse:
        """The same on the CPU, in float64."""
        moments = None if self.moments is None else self.moments.cpu()
        return ExpertUse(self.share_sum.double().cpu(), float(self.entropy_sum), moments)

    def with_that_of(self, other: ExpertUse) -> ExpertUse:
        """The use over the images of both, each of which has some."""
        assert self.moments is not None
        assert other.moments is not None
        moments = self.moments.with_those_of(other.moments)
        return ExpertUse(self.share_sum + other.share_sum, self.entropy_sum + other.entropy_sum, moments)


class ExpertUseMeter(RouterHooks):
    """Measures the use of experts by layer or block while the model runs, until closed."""

    def __init__(self, model: nn.Module) -> None:
        self.uses: dict[str, ExpertUse] = {}
        self.counting = True
        super().__init__(model)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside the ``with`` statement is not counted."""
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def together(self, world: World) -> dict[str, ExpertUse]:
        """The use of experts over the images of all processes, which must call it together."""
        own = {name: use.cpu() for name, use in self.uses.items()}
        total: dict[str, ExpertUse] = {}
        for uses in world.gather(own):
            for name, use in uses.items():
                total[name] = total[name].with_that_of(use) if name in total else use
        return total

    def routed(self, name: str, router: nn.Module, args: object, mixture: Mixture) -> None:
        if self.counting and mixture.gate is not None and mixture.gate.shape[1] > 1:
            if name not in self.uses:
                self.uses[name] = ExpertUse(mixture.gate.new_zeros(mixture.gate.shape[1], dtype=torch.float32))
            self.uses[name].add(mixture.gate)


def without_effect(model: nn.Module, uses: dict[str, ExpertUse]) -> str:
    """A note when the mixed kernels of more than half of the layers hardly differ between images; else empty.

    All processes must call it together: experts may be sharded.
    """
    layers = [(use, layer) for name, use in uses.items() for layer in routed_layers(model)[name]]
    constant = sum(use.kernel_variation(full_tensor(layer.weight)) < CONSTANT_KERNEL for use, layer in layers)
    if 2 * constant <= len(layers):
        return ""
    return (
        f"Routing has hardly any effect: the mixed kernels of {constant} of {len(layers)} layers vary by less than "
        f"{CONSTANT_KERNEL:.0%} between images. The unconverted model, trained with the same options, may do as well."
    )
