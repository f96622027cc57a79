"""How a model uses its experts on the validation images, and whether its routing has an effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from condconv_surgery.layers import Mixture
from condconv_surgery.layers.find_layers import routed_layers
from condconv_surgery.layers.gate_statistics import CONSTANT_KERNEL, entropy, kernel_variation, shares
from condconv_surgery.training.distributed.fsdp import full_tensor
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gate_regularization import RouterHooks


@dataclass
class ExpertUse:
    """Use of the experts of a layer: sums over images of the gate shares, of their entropy, of the gates and of their
    products. They stay on the device until they are read."""

    share_sum: Tensor  # [E]
    entropy_sum: Tensor | float = 0.0
    count: int = 0
    gate_sum: Tensor | float = 0.0  # [E]
    product_sum: Tensor | float = 0.0  # [E, E]

    def add(self, gate: Tensor) -> None:
        """Add the gates [B, E] of some images."""
        p = shares(gate.detach().float())
        self.share_sum = self.share_sum + p.sum(0)
        self.entropy_sum = self.entropy_sum + entropy(p).sum().double()
        self.count += len(p)
        exact = gate.detach().double()
        self.gate_sum = self.gate_sum + exact.sum(0)
        self.product_sum = self.product_sum + exact.T @ exact

    @property
    def use(self) -> list[float]:
        """Mean share of each expert."""
        return [share / self.count for share in self.share_sum.tolist()]

    @property
    def entropy(self) -> float:
        """Mean entropy of an image's shares, as a fraction of log E."""
        return float(self.entropy_sum) / self.count / math.log(len(self.share_sum))

    def kernel_variation(self, experts: Tensor) -> float:
        """How much the kernels mixed of ``experts`` differ between the images (``gate_statistics``)."""
        mean = torch.as_tensor(self.gate_sum) / self.count
        covariance = torch.as_tensor(self.product_sum) / self.count - torch.outer(mean, mean)
        return kernel_variation(covariance, mean, experts.to(mean.device))


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
        own = {name: _on_cpu(use) for name, use in self.uses.items()}
        total: dict[str, ExpertUse] = {}
        for uses in world.gather(own):
            for name, use in uses.items():
                total[name] = _sum(total[name], use) if name in total else use
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


def _on_cpu(use: ExpertUse) -> ExpertUse:
    tensors = (torch.as_tensor(part).double().cpu() for part in (use.share_sum, use.gate_sum, use.product_sum))
    share_sum, gate_sum, product_sum = tensors
    return ExpertUse(share_sum, float(use.entropy_sum), use.count, gate_sum, product_sum)


def _sum(one: ExpertUse, other: ExpertUse) -> ExpertUse:
    return ExpertUse(*(getattr(one, f.name) + getattr(other, f.name) for f in fields(ExpertUse)))
