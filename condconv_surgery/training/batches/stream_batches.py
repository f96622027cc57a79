"""Batches of a streamed data set.

The training process reads rows, shuffled within a buffer; the loader's workers decode and transform them. Each process
of a run reads its own share. So the order is a function of seed, epoch and the number of processes, not of the number
of workers, and a run is resumed at any step by skipping the rows before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Sampler

from condconv_surgery.data.hub_streams import HubStream, StreamRow
from condconv_surgery.errors import InputError
from condconv_surgery.runtime.seeding import seed_of
from condconv_surgery.training.batches.samplers import Steps
from condconv_surgery.training.distributed.world import World


class StreamBatches(Sampler[list[StreamRow]]):
    """The training batches of one process from step ``steps.start`` on, like ``TrainingBatches`` for files.

    A process whose share ends before the epoch does reads it again in another order.
    """

    def __init__(self, stream: HubStream, steps: Steps, seed: int, buffer: int, world: World) -> None:
        self.stream, self.steps, self.seed, self.buffer, self.world = stream, steps, seed, buffer, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[StreamRow]]:
        steps = self.steps
        first, position = divmod(steps.start, steps.steps_per_epoch)
        for epoch in range(first, steps.epochs):
            rows = self._endless(epoch)
            for step in range(steps.steps_per_epoch):
                parts = [list(islice(rows, steps.slice_size)) for _ in range(steps.accumulate)]
                if epoch > first or step >= position:
                    yield from parts

    def _endless(self, epoch: int) -> Iterator[StreamRow]:
        from datasets.distributed import split_dataset_by_node

        lap = 0
        while True:
            order = seed_of(self.seed, "order", epoch, lap) % 2**32
            rows = self.stream.rows.shuffle(seed=order, buffer_size=self.buffer)
            mine = split_dataset_by_node(rows, self.world.rank, self.world.size)
            found = False
            for row in self.stream.read(epoch, mine):
                found = True
                yield row
            if not found:
                raise InputError(
                    f"{self.stream.title} has no rows for process {self.world.rank} of {self.world.size}.",
                    "There must be some for each.",
                    "fewer processes",
                )
            lap += 1


class StreamEvaluation(Sampler[list[StreamRow]]):
    """Every row exactly once over all processes."""

    def __init__(self, stream: HubStream, batch_size: int, world: World) -> None:
        self.stream, self.batch_size, self.world = stream, batch_size, world

    def __iter__(self) -> Iterator[list[StreamRow]]:
        rows = islice(self.stream.read(0, self.stream.rows), self.world.rank, None, self.world.size)
        while batch := list(islice(rows, self.batch_size)):
            yield batch
