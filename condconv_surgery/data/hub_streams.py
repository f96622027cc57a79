"""Hugging Face data sets that are streamed: read from the beginning each epoch, never stored (``data.streaming``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from condconv_surgery.data.decode_image import UnreadableImageError, decode_image
from condconv_surgery.data.hub_datasets import columns, load_splits, open_cell, split_names, undecoded
from condconv_surgery.data.image_dataset import Sample, Transform, UnreadableName
from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.runtime.seeding import seeded


class StreamRow(NamedTuple):
    """A row in one epoch: the undecoded image and its label. Epoch and number determine the random transforms."""

    epoch: int
    number: int
    cell: Any
    label: int


@dataclass(frozen=True)
class HubStream:
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
        """Images per class. Not known before all are read: equal counts are assumed."""
        return [max(self.count // len(self.classes), 1)] * len(self.classes)

    def fingerprint(self) -> str:
        """A hash of name, length and classes."""
        return hashlib.sha256(repr((self.title, self.count, self.classes)).encode()).hexdigest()

    def read(self, epoch: int, rows: Any) -> Iterator[StreamRow]:
        """``rows`` of this split, numbered in order. Raises ``TrainingError`` when the source fails."""
        number = 0
        try:
            for number, row in enumerate(rows, start=1):
                label = row[self.label]
                yield StreamRow(epoch, number - 1, row[self.image], -1 if label is None else int(label))
        except Exception as error:  # pyarrow, fsspec and http clients have no base class in common
            raise TrainingError(
                f"{self.title} can't be read on after row {number} of epoch {epoch + 1}: {error}.",
                "The source must stay readable.",
                "the same run with resume=True",
            ) from error


class StreamDataset(Dataset[Sample]):
    """Rows as samples; one without a label, or that cannot be decoded, has no image."""

    def __init__(self, title: str, transform: Transform, *, channels: int = 3, seed: int = 0, least: int = 0) -> None:
        self.title, self.transform, self.channels, self.seed, self.least = title, transform, channels, seed, least

    def __getitem__(self, row: StreamRow) -> Sample:
        if row.label < 0:
            return Sample(None, -1, (f"{self.title}: row {row.number} of epoch {row.epoch + 1}, which has no label",))
        try:
            image = decode_image(partial(open_cell, row.cell), self.channels, least=self.least)
        except UnreadableImageError as error:
            name = (row.cell or {}).get("path") or f"row {row.number} of epoch {row.epoch + 1}"
            return Sample(None, -1, (UnreadableName(f"{self.title}: {name}", error.reason),))
        with seeded(self.seed, "transform", row.epoch, row.number):
            return Sample(self.transform(image), row.label)


def find_streams(options: DataOptions) -> tuple[HubStream, HubStream]:
    """The training and the validation split of ``hf:PATH_OR_NAME``, to be streamed.

    Raises ``InputError`` without a second split or without class names: both need the whole set.
    """
    parts = load_splits(options, streaming=True)
    names = split_names(list(parts), options)
    if "val" not in names:
        raise InputError(
            f"{options.folder} has one split only: {names['train']}."
            if len(names) == 1
            else f"{options.folder} has no validation split, only {' and '.join(names.values())}.",
            "A stream cannot be split before it is read, and a test split selects nothing unless you say so.",
            'data.val="test", or data.streaming=False' if "test" in names else "data.streaming=False",
        )
    train_name, val_name = names["train"], names["val"]
    train, val = (_stream(parts[name], name, options) for name in (train_name, val_name))
    if train.classes != val.classes:
        raise InputError(
            f"The splits {train_name} and {val_name} have different classes.",
            "A stream's splits must have the same class names, in the same order.",
            "data.streaming=False",
        )
    return train, val


def _stream(rows: Any, name: str, options: DataOptions) -> HubStream:
    title = f"{options.folder.partition(':')[2]} {name}"
    image, label = columns(rows.features, title, options)
    names = getattr(rows.features[label], "names", None)
    if not names:
        raise InputError(
            f"{title}: the column {label} does not name its classes: {rows.features[label]}.",
            "A stream needs a ClassLabel column: it is not read as a whole before training.",
            "data.streaming=False",
        )
    known = (rows.info.splits or {}).get(name)
    count = known.num_examples if known is not None else 0
    count = count or sum(1 for _ in rows.select_columns([label]))  # reads the labels once
    return HubStream(title, undecoded(rows.select_columns([image, label]), image), image, label, tuple(names), count)
