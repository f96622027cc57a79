"""The processes of a run and their collective operations. ``torchrun`` starts them, this package never does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run. Only ``rank`` 0 writes files and reports."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """The sum of ``values`` over all processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over all processes, on the device; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The ``value``, a small Python object, of every process in order of rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # all are filled

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)
            tensor /= self.size

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by that of the first process."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


ONE_PROCESS = World()


@contextmanager
def open_world() -> Iterator[World]:
    """The processes that ``torchrun`` describes in the environment, else this process alone.

    One process for each GPU over NCCL; on CPU over gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(device=device)
        return
    # After a restart by torchrun the store may hold addresses of dead processes of the previous attempt.
    store, rank, size = next(rendezvous("env://"))
    fresh = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # no process leaves while another still communicates
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
