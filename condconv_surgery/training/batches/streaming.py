"""A Hugging Face data set that is read from its beginning, over and over, and never stored (``data.streaming``).

The training process reads rows, shuffled within a buffer; the loader's workers decode and transform them. Each process
of a run reads its own share. So the order is a function of seed, epoch and the number of processes, whatever the
workers, and a run goes on at any step by passing over the rows before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Sampler

from condconv_surgery.data.hub_datasets import columns, load_splits, open_cell, split_names, undecoded
from condconv_surgery.data.image_dataset import Sample, Transform, UnreadableImageError, decode_image
from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.runtime.seeding import seed_of, seeded
from condconv_surgery.training.batches.samplers import Steps
from condconv_surgery.training.distributed.world import World


class Row(NamedTuple):
    """A row in one epoch: the undecoded image, its label, and what its random transforms depend on."""

    epoch: int
    number: int
    cell: Any
    label: int


@dataclass(frozen=True)
class Stream:
    """One split: ``count`` rows of images and labels."""

    title: str
    rows: Any  # datasets.IterableDataset
    image: str
    label: str
    classes: tuple[str, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    def counts(self) -> list[int]:
        """How many images each class has: nobody knows before all are read, so as if all classes were alike."""
        return [max(self.count // len(self.classes), 1)] * len(self.classes)

    def fingerprint(self) -> str:
        """A hash of name, length and classes."""
        return hashlib.sha256(repr((self.title, self.count, self.classes)).encode()).hexdigest()

    def read(self, epoch: int, rows: Any) -> Iterator[Row]:
        """``rows`` of this split, numbered as they come. Raises ``TrainingError`` when there comes no more."""
        number = 0
        try:
            for number, row in enumerate(rows, start=1):
                label = row[self.label]
                yield Row(epoch, number - 1, row[self.image], -1 if label is None else int(label))
        except Exception as error:  # pyarrow, fsspec and http clients have no base class in common
            raise TrainingError(
                f"{self.title} can't be read on after row {number} of epoch {epoch + 1}: {error}.",
                "The source must stay readable. States saved before are kept.",
                "the same command with --resume",
            ) from error


class StreamBatches(Sampler[list[Row]]):
    """The training batches of one process from step ``steps.start`` on, as ``TrainingBatches`` gives them of files.

    A process whose share ends before the epoch does reads it again in another order.
    """

    def __init__(self, stream: Stream, steps: Steps, seed: int, buffer: int, world: World) -> None:
        self.stream, self.steps, self.seed, self.buffer, self.world = stream, steps, seed, buffer, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Row]]:
        steps = self.steps
        first, position = divmod(steps.start, steps.steps_per_epoch)
        for epoch in range(first, steps.epochs):
            rows = self._endless(epoch)
            for step in range(steps.steps_per_epoch):
                parts = [list(islice(rows, steps.slice_size)) for _ in range(steps.accumulate)]
                if epoch > first or step >= position:
                    yield from parts

    def _endless(self, epoch: int) -> Iterator[Row]:
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


class StreamEvaluation(Sampler[list[Row]]):
    """Every row exactly once over all processes."""

    def __init__(self, stream: Stream, batch_size: int, world: World) -> None:
        self.stream, self.batch_size, self.world = stream, batch_size, world

    def __iter__(self) -> Iterator[list[Row]]:
        rows = islice(self.stream.read(0, self.stream.rows), self.world.rank, None, self.world.size)
        while batch := list(islice(rows, self.batch_size)):
            yield batch


class RowDataset(Dataset[Sample]):
    """Rows as samples; one without a label, or that can't be decoded, has no image."""

    def __init__(self, title: str, transform: Transform, *, channels: int = 3, seed: int = 0) -> None:
        self.title, self.transform, self.channels, self.seed = title, transform, channels, seed

    def __getitem__(self, row: Row) -> Sample:
        if row.label < 0:
            return Sample(None, -1, (f"{self.title}: row {row.number} of epoch {row.epoch + 1}, which has no label",))
        try:
            image = decode_image(partial(open_cell, row.cell), self.channels)
        except UnreadableImageError:
            name = (row.cell or {}).get("path") or f"row {row.number} of epoch {row.epoch + 1}"
            return Sample(None, -1, (f"{self.title}: {name}",))
        with seeded(self.seed, "transform", row.epoch, row.number):
            return Sample(self.transform(image), row.label)


def find_streams(options: DataOptions) -> tuple[Stream, Stream]:
    """The training and the validation split of ``hf:PATH_OR_NAME``, to be streamed.

    Raises ``InputError`` without a second split or without class names: both need the whole set.
    """
    parts = load_splits(options, streaming=True)
    train_name, val_name = split_names(list(parts), options)
    if val_name is None:
        raise InputError(
            f"{options.folder} has one split only: {train_name}.",
            "A stream can't be split before it is read.",
            "--set data.streaming=false, or save a second split",
        )
    train, val = (_stream(parts[name], name, options) for name in (train_name, val_name))
    if train.classes != val.classes:
        raise InputError(
            f"The splits {train_name} and {val_name} have other classes.",
            "A stream's splits must have the same class names, in the same order.",
            "--set data.streaming=false",
        )
    return train, val


def _stream(rows: Any, name: str, options: DataOptions) -> Stream:
    title = f"{options.folder.partition(':')[2]} {name}"
    image, label = columns(rows.features, title, options)
    names = getattr(rows.features[label], "names", None)
    if not names:
        raise InputError(
            f"{title}: the column {label} doesn't say what its classes are: {rows.features[label]}.",
            "A stream needs a ClassLabel column, for nobody reads it all beforehand.",
            "--set data.streaming=false",
        )
    known = (rows.info.splits or {}).get(name)
    count = known.num_examples if known is not None and known.num_examples else _counted(rows, label)
    return Stream(title, undecoded(rows.select_columns([image, label]), image), image, label, tuple(names), count)


def _counted(rows: Any, label: str) -> int:
    """By reading the labels once."""
    return sum(1 for _ in rows.select_columns([label]))
