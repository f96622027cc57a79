"""Weights and optimizer state split over the processes, for experts that don't fit on one device: torch's FSDP2.

A sharded parameter is a ``DTensor``: each process holds a part. A conditional layer is gathered when it runs and let go
again; so is all the rest of the model, as one piece.
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
from condconv_surgery.training.distributed.world import World


def check_sharding(engine: EngineOptions, world: World) -> None:
    """Raise ``InputError`` where sharding can't be had."""
    if not engine.shard:
        return
    if world.size == 1:
        raise InputError(
            "engine.shard with one process.",
            "A model is split over several processes.",
            "torchrun --nproc-per-node 2 -m condconv_surgery finetune ..., or --set engine.shard=false",
        )
    for name, clashes in (("precision=fp16", engine.precision == "fp16"), ("compile", engine.compile)):
        if clashes:
            raise InputError(
                f"engine.shard with engine.{name}.",
                "A sharded model trains in fp32 or bf16, uncompiled.",
                "--precision bf16, or --set engine.compile=false",
            )


def shard(model: nn.Module, world: World) -> None:
    """Split ``model`` in place: each conditional layer by itself, then the rest. It moves to the world's device."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in conditional_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the processes hold parts of. Every process must ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(place: Tensor, value: Tensor) -> Tensor:
    """``value``, known to every process, split as ``place`` is."""
    if not isinstance(place, DTensor) or value.shape != place.shape:
        return value
    return distribute_tensor(value.to(place.device), place.device_mesh, place.placements)


class Shell:
    """An unsharded copy of a model on the CPU, to be filled and saved. Made before the model is sharded."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model = copy.deepcopy(model).cpu() if world.speaks else None

    @torch.no_grad()
    def filled(self, model: nn.Module) -> nn.Module | None:
        """The copy with the weights of ``model`` as they are now; ``None`` in every process but the first."""
        places = {} if self.model is None else self.model.state_dict()
        for name, tensor in model.state_dict().items():
            value = whole(tensor)  # in all processes
            if name in places:
                places[name].copy_(value)
        return self.model
