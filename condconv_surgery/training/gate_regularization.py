"""Regularisation of gates in training: expert dropout, and losses on the balance and the sharpness of gates."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from condconv_surgery.layers import Mixture
from condconv_surgery.layers.find_layers import router_hooks
from condconv_surgery.layers.gate_statistics import entropy, shares


class RouterHooks:
    """Base of a forward hook on each router of a model, until it is closed."""

    def __init__(self, model: nn.Module) -> None:
        self.hooks = ExitStack()
        self.hooks.enter_context(router_hooks(model, self.routed))

    def close(self) -> None:
        self.hooks.close()

    def routed(self, name: str, router: nn.Module, args: object, mixture: Mixture) -> Mixture | None:
        """Called with each mixture of the router of a layer or block; the mixture to use instead, if any."""
        raise NotImplementedError


class GateRecorder(RouterHooks):
    """Records the gate [B, E] of every router with more than one expert, each time it runs."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, Tensor] = {}
        super().__init__(model)

    def take(self) -> dict[str, Tensor]:
        """The gates since the last ``take``, by layer or block; of a router called twice, the last."""
        seen, self.seen = self.seen, {}
        return seen

    def routed(self, name: str, router: nn.Module, args: object, mixture: Mixture) -> None:
        if mixture.gate is not None and mixture.gate.shape[1] > 1:
            self.seen[name] = mixture.gate


class ExpertDropout(RouterHooks):
    """In train mode, drops each expert of each image with probability ``p``.

    The remaining gates are scaled so that their sum stays the same; where all would be dropped, none is.
    """

    def __init__(self, model: nn.Module, p: float) -> None:
        self.p = p
        super().__init__(model)

    def routed(self, name: str, router: nn.Module, args: object, mixture: Mixture) -> Mixture | None:
        if not router.training or mixture.gate is None:
            return None
        gate = mixture.gate  # [B, E]
        kept = gate * (torch.rand_like(gate) >= self.p)
        left = kept.sum(1, keepdim=True)
        scaled = kept * (gate.sum(1, keepdim=True) / left.clamp_min(torch.finfo(gate.dtype).tiny))
        return mixture._replace(gate=torch.where(left > 0, scaled, gate))


def balance_loss(gate: Tensor) -> Tensor:
    """``log E - H(mean share)``: 0 when the batch uses all experts equally, log E when it uses one expert only."""
    return math.log(gate.shape[1]) - entropy(shares(gate.float()).mean(0))


def sharpness_loss(gate: Tensor) -> Tensor:
    """``mean H(share)``: 0 when each image uses one expert, log E when it uses all equally."""
    return entropy(shares(gate.float())).mean()
