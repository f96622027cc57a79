"""Which images a step trains on: a function of seed and step, for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from condconv_surgery.data.image_dataset import Draw
from condconv_surgery.errors import InputError
from condconv_surgery.runtime.seeding import generator_for


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the images in one epoch."""
    return torch.randperm(count, generator=generator_for(seed, "order", epoch)).tolist()


class Steps:
    """The images of a run divided into steps and slices; ``start`` is the step that the next iteration begins with.

    A step takes ``batch_size`` images in ``world * accumulate`` equal slices. The images left at the end of an epoch,
    fewer than a batch, are not used in it. A set smaller than one batch is one batch.

    Raises ``InputError`` when a step cannot be divided equally.
    """

    def __init__(self, count: int, batch_size: int, *, epochs: int, world: int = 1, accumulate: int = 1) -> None:
        slices = world * accumulate
        if batch_size % slices:
            raise InputError(
                f"A batch of {batch_size} images for {world} processes with accumulation {accumulate}.",
                f"The batch is divided equally: a multiple of {slices}.",
                f"data.batch_size={-(-batch_size // slices) * slices}",
            )
        self.batch_size = min(batch_size, count // slices * slices)
        if not self.batch_size:
            raise InputError(
                f"{count} training images for {world} processes with accumulation {accumulate}.",
                f"There must be at least {slices}.",
                "more images, or fewer processes",
            )
        self.count, self.epochs, self.accumulate = count, epochs, accumulate
        self.slice_size = self.batch_size // slices
        self.steps_per_epoch = count // self.batch_size
        self.start = 0

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate


class TrainingBatches(Sampler[list[Draw]]):
    """The batches of one process from step ``steps.start`` to the last, without a pause between epochs.

    A step takes the next images of the epoch's order; process ``rank`` gets slices ``rank * accumulate`` and
    following. So two processes together train on the images that one process alone would train on.
    """

    def __init__(self, steps: Steps, seed: int, rank: int = 0) -> None:
        self.steps, self.seed, self.rank = steps, seed, rank

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        steps = self.steps
        order: list[int] = []
        first = self.rank * steps.accumulate
        for step in range(steps.start, steps.steps):
            epoch, position = divmod(step, steps.steps_per_epoch)
            if not order or position == 0:
                order = epoch_order(steps.count, self.seed, epoch)
            for part in range(first, first + steps.accumulate):
                begin = position * steps.batch_size + part * steps.slice_size
                yield [Draw(epoch, index) for index in order[begin : begin + steps.slice_size]]


class EvaluationBatches(Sampler[list[Draw]]):
    """Every image exactly once over all processes, in order, without padding."""

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.mine = range(rank, count, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        for begin in range(0, len(self.mine), self.batch_size):
            yield [Draw(0, index) for index in self.mine[begin : begin + self.batch_size]]
