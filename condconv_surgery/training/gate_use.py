"""The gates that a model computes while it runs: watched, thinned out, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condconv_surgery.layers import Mixture, routers
from condconv_surgery.layers.gate_statistics import entropy, shares
from condconv_surgery.training.distributed.world import World


class GateWatch:
    """Notes the gate [B, E] of every router with more than one expert, each time it runs."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, Tensor] = {}
        self.handles = [router.register_forward_hook(self._noting(name)) for name, router in routers(model).items()]

    def take(self) -> dict[str, Tensor]:
        """The gates since the last ``take``, by layer or block; of one called twice, the last."""
        seen, self.seen = self.seen, {}
        return seen

    def close(self) -> None:
        """Watch no more."""
        for handle in self.handles:
            handle.remove()

    def _noting(self, name: str) -> Callable[[nn.Module, object, Mixture], None]:
        def note(router: nn.Module, args: object, mixture: Mixture) -> None:
            if mixture.gate is not None and mixture.gate.shape[1] > 1:
                self.seen[name] = mixture.gate

        return note


class ExpertDropout:
    """In training, each expert of each image is left out with probability ``p``.

    The gates that are left are scaled so that their sum stays; where all would go, all stay.
    """

    def __init__(self, model: nn.Module, p: float) -> None:
        self.p = p
        self.handles = [router.register_forward_hook(self._drop) for router in routers(model).values()]

    def close(self) -> None:
        """Drop no more."""
        for handle in self.handles:
            handle.remove()

    def _drop(self, router: nn.Module, args: object, mixture: Mixture) -> Mixture | None:
        if not router.training or mixture.gate is None:
            return None
        gate = mixture.gate  # [B, E]
        kept = gate * (torch.rand_like(gate) >= self.p)
        left = kept.sum(1, keepdim=True)
        scaled = kept * (gate.sum(1, keepdim=True) / left.clamp_min(torch.finfo(gate.dtype).tiny))
        return mixture._replace(gate=torch.where(left > 0, scaled, gate))


def balance_loss(gate: Tensor) -> Tensor:
    """``log E - H(mean share)``: 0 when all experts are used alike over the batch, log E when one is used alone."""
    return math.log(gate.shape[1]) - entropy(shares(gate.float()).mean(0))


def sharpness_loss(gate: Tensor) -> Tensor:
    """``mean H(share)``: 0 when each image has one expert, log E when it has all alike."""
    return entropy(shares(gate.float())).mean()


@dataclass
class GateUse:
    """How a layer uses its experts: sums over images of their shares and of the entropy of the shares."""

    share_sum: Tensor  # [E]; it stays on the device, as the entropy does, until it is read
    entropy_sum: Tensor | float = 0.0
    count: int = 0

    def add(self, gate: Tensor) -> None:
        """Note the gates [B, E] of some images."""
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
        """Mean entropy of a image's shares, as a fraction of log E."""
        return float(self.entropy_sum) / self.count / math.log(len(self.share_sum))


class GateMeter:
    """Counts the use of experts by layer or block while the model runs, until closed."""

    def __init__(self, model: nn.Module) -> None:
        self.uses: dict[str, GateUse] = {}
        self.counting = True
        self.handles = [router.register_forward_hook(self._of(name)) for name, router in routers(model).items()]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside the ``with`` statement does not count."""
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def together(self, world: World) -> dict[str, GateUse]:
        """The use of experts over the images of all processes, which must ask for it at the same time."""
        own = {name: (use.share_sum.tolist(), float(use.entropy_sum), use.count) for name, use in self.uses.items()}
        total: dict[str, GateUse] = {}
        for uses in world.gather(own):
            for name, (shares_of, entropy_sum, count) in uses.items():
                use = total.setdefault(name, GateUse(torch.zeros(len(shares_of), dtype=torch.float64)))
                use.share_sum += torch.tensor(shares_of, dtype=torch.float64)
                use.entropy_sum += entropy_sum
                use.count += count
        return total

    def close(self) -> None:
        """Count no more."""
        for handle in self.handles:
            handle.remove()

    def _of(self, name: str) -> Callable[[nn.Module, object, Mixture], None]:
        def count(router: nn.Module, args: object, mixture: Mixture) -> None:
            if self.counting and mixture.gate is not None and mixture.gate.shape[1] > 1:
                if name not in self.uses:
                    self.uses[name] = GateUse(mixture.gate.new_zeros(mixture.gate.shape[1], dtype=torch.float32))
                self.uses[name].add(mixture.gate)

        return count
