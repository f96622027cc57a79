"""How a model uses its experts on the validation images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condconv_surgery.layers import Mixture
from condconv_surgery.layers.gate_statistics import entropy, shares
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gate_regularization import RouterHooks


@dataclass
class ExpertUse:
    """Use of the experts of a layer: sums over images of the gate shares and of their entropy."""

    share_sum: Tensor  # [E]; like the entropy it stays on the device until it is read
    entropy_sum: Tensor | float = 0.0
    count: int = 0

    def add(self, gate: Tensor) -> None:
        """Add the gates [B, E] of some images."""
        p = shares(gate.detach().float())
        self.share_sum = self.share_sum + p.sum(0)
        self.entropy_sum = self.entropy_sum + entropy(p).sum().double()
        self.count += len(p)

    @property
    def use(self) -> list[float]:
        """Mean share of each expert."""
        return [share / self.count for share in self.share_sum.tolist()]

    @property
    def entropy(self) -> float:
        """Mean entropy of an image's shares, as a fraction of log E."""
        return float(self.entropy_sum) / self.count / math.log(len(self.share_sum))


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
        own = {name: (use.share_sum.tolist(), float(use.entropy_sum), use.count) for name, use in self.uses.items()}
        total: dict[str, ExpertUse] = {}
        for uses in world.gather(own):
            for name, (shares_of, entropy_sum, count) in uses.items():
                use = total.setdefault(name, ExpertUse(torch.zeros(len(shares_of), dtype=torch.float64)))
                use.share_sum += torch.tensor(shares_of, dtype=torch.float64)
                use.entropy_sum += entropy_sum
                use.count += count
        return total

    def routed(self, name: str, router: nn.Module, args: object, mixture: Mixture) -> None:
        if self.counting and mixture.gate is not None and mixture.gate.shape[1] > 1:
            if name not in self.uses:
                self.uses[name] = ExpertUse(mixture.gate.new_zeros(mixture.gate.shape[1], dtype=torch.float32))
            self.uses[name].add(mixture.gate)
