"""Weights and optimizer state sharded over the processes, for experts that do not fit on one device: torch's FSDP2.

A sharded parameter is a ``DTensor``: each process holds a part. A conditional layer is gathered when it runs and freed
after it; so is the rest of the model, as one unit.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.recipe.training_sections import EngineOptions
from condconv_surgery.runtime.own_state import own_state
from condconv_surgery.training.distributed.world import World


def check_sharding(engine: EngineOptions, world: World) -> None:
    """Raise ``InputError`` where sharding is not supported."""
    if not engine.shard:
        return
    if world.size == 1:
        raise InputError(
            "engine.shard=True with one process.",
            "A model is split over several processes.",
            "torchrun --nproc-per-node 2 ..., or engine.shard=False",
        )
    for name, clashes in (('precision="fp16"', engine.precision == "fp16"), ("compile=True", engine.compile)):
        if clashes:
            raise InputError(
                f"engine.shard=True with engine.{name}.",
                "A sharded model is trained in fp32 or bf16, uncompiled.",
                'engine.precision="bf16", engine.compile=False',
            )


def shard(model: nn.Module, world: World) -> None:
    """Shard ``model`` in place, each conditional layer as one unit, then the rest, and move it to the device."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in conditional_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one. Collective: every process must call it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(target: Tensor, value: Tensor) -> Tensor:
    """``value``, known to every process, sharded like ``target``."""
    if not isinstance(target, DTensor) or value.shape != target.shape:
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


class UnshardedCopy:
    """A copy of a model on the CPU, to be filled and saved. Make it before the model is sharded."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model = copy.deepcopy(model).cpu() if world.is_first else None

    @torch.no_grad()
    def filled(self, model: nn.Module) -> nn.Module | None:
        """The copy with the current weights of ``model``; ``None`` in every process but the first. Collective."""
        targets = {} if self.model is None else own_state(self.model)
        for name, tensor in own_state(model).items():
            value = full_tensor(tensor)  # in all processes
            if name in targets:
                targets[name].copy_(value)
        return self.model
