"""Pictures with labels, wherever they lie: what every kind of data set can tell, and how one is split."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from condconv_surgery.errors import InputError

L = TypeVar("L", bound="Labelled")
R = TypeVar("R", bound="Rows")


class Labelled(ABC):
    """Picture ``i`` belongs to ``classes[labels[i]]``; it is opened only when it is needed."""

    classes: tuple[str, ...]
    labels: tuple[int, ...]

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person calls a picture: a file, or a place in a data set."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """One picture, of any size and mode. What PIL raises for a damaged one is left to the caller."""

    @abstractmethod
    def subset(self: L, indices: Sequence[int]) -> L:
        """Some of the pictures, with the same classes."""

    def key(self, index: int) -> str:
        """What tells a picture from the others, however the data set was reached."""
        return self.name(index)

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> list[int]:
        """How many pictures each class has."""
        counts = [0] * len(self.classes)
        for label in self.labels:
            counts[label] += 1
        return counts

    def fingerprint(self) -> str:
        """A hash of keys and labels: a run goes on only with the pictures that it started with."""
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels):
            digest.update(f"{self.key(index)}\0{label}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Rows(Labelled):
    """Some rows, ``indices``, of a data set that a library reads."""

    title: str
    data: Any
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    indices: tuple[int, ...]

    def name(self, index: int) -> str:
        return f"{self.title}[{self.indices[index]}]"

    def subset(self: R, indices: Sequence[int]) -> R:
        return replace(
            self, labels=tuple(self.labels[i] for i in indices), indices=tuple(self.indices[i] for i in indices)
        )


def split(pictures: L, val_fraction: float, seed: int) -> tuple[L, L]:
    """Each class split by the seed: ``val_fraction`` of it (at least one picture) for validation, the rest to train."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(pictures.labels):
        members.setdefault(label, []).append(index)
    train: list[int] = []
    val: list[int] = []
    for label, name in enumerate(pictures.classes):
        these = members.get(label, [])
        if len(these) < 2:
            raise InputError(
                f"The class {name} has {'one picture only' if these else 'no pictures'}.",
                "A split needs two of each: one to train on, one to validate on.",
                "add pictures, or make the folders train and val yourself",
            )
        random.Random(f"{seed}/{name}").shuffle(these)
        kept = min(max(round(len(these) * val_fraction), 1), len(these) - 1)
        val += these[:kept]
        train += these[kept:]
    return pictures.subset(sorted(train)), pictures.subset(sorted(val))


def matched(val: L, train: Labelled, where: str) -> L:
    """``val`` with the class numbers of ``train``. Raises ``InputError`` for a class that ``train`` has not."""
    strange = sorted(set(val.classes) - set(train.classes))
    if strange:
        raise InputError(
            f"{where} has classes that the training pictures have not: {', '.join(strange[:5])}.",
            f"The training classes are: {', '.join(train.classes[:8])}{', ...' if len(train.classes) > 8 else ''}.",
            "give both the same classes",
        )
    index = {name: i for i, name in enumerate(train.classes)}
    labels = tuple(index[val.classes[label]] for label in val.labels)
    return replace(val, classes=train.classes, labels=labels)  # type: ignore[type-var]
