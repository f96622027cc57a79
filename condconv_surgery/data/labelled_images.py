"""Labelled images of any data set: the common interface, the split by a seed, an even subset, matching of classes."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from condconv_surgery.errors import InputError

L = TypeVar("L", bound="LabelledImages")
R = TypeVar("R", bound="Rows")


class LabelledImages(ABC):
    """Image ``i`` belongs to ``classes[labels[i]]``. ``open`` reads it when it is needed."""

    classes: tuple[str, ...]
    labels: tuple[int, ...]

    @abstractmethod
    def name(self, index: int) -> str:
        """The file of an image, or its index in a data set; for messages."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """One image, of any size and mode. Passes on what PIL raises for a damaged one."""

    @abstractmethod
    def subset(self: L, indices: Sequence[int]) -> L:
        """Some of the images, with the same classes."""

    def key(self, index: int) -> str:
        """Identifies an image, wherever the data set is stored."""
        return self.name(index)

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> list[int]:
        counts = [0] * len(self.classes)
        for label in self.labels:
            counts[label] += 1
        return counts

    def fingerprint(self) -> str:
        """SHA-256 of keys and labels: a run is resumed only with the images that it started with."""
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels):
            digest.update(f"{self.key(index)}\0{label}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Rows(LabelledImages):
    """The rows ``indices`` of ``data``, a data set that another library reads."""

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


def split(images: L, val_fraction: float, seed: int) -> tuple[L, L]:
    """Training and validation images: of each class ``val_fraction``, at least one image, is for validation.

    The seed and the class name choose them. Raises ``InputError`` for a class of fewer than two images.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(images.labels):
        members.setdefault(label, []).append(index)
    train: list[int] = []
    val: list[int] = []
    for label, name in enumerate(images.classes):
        indices = members.get(label, [])
        if len(indices) < 2:
            raise InputError(
                f"The class {name} has {'one image only' if indices else 'no images'}.",
                "A split needs two of each class: one to train on, one to validate on.",
                "add images, or make the folders train and val yourself",
            )
        random.Random(f"{seed}/{name}").shuffle(indices)
        count = min(max(round(len(indices) * val_fraction), 1), len(indices) - 1)
        val += indices[:count]
        train += indices[count:]
    return images.subset(sorted(train)), images.subset(sorted(val))


def even_subset(images: L, limit: int) -> L:
    """At most ``limit`` images, evenly from all classes: the first of each class, then the second, ...; in order."""
    seen = [0] * len(images.classes)
    ranked = []
    for index, label in enumerate(images.labels):
        ranked.append((seen[label], label, index))
        seen[label] += 1
    return images.subset(sorted(index for _, _, index in sorted(ranked)[:limit]))


def with_classes_of(train: LabelledImages, val: L, where: str) -> L:
    """``val`` with the class numbers of ``train``. Raises ``InputError`` for a class that ``train`` does not have."""
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise InputError(
            f"{where} has classes that the training images do not have: {', '.join(unknown[:5])}.",
            f"The training classes are: {', '.join(train.classes[:8])}{', ...' if len(train.classes) > 8 else ''}.",
            "use the same class names in both",
        )
    index = {name: i for i, name in enumerate(train.classes)}
    labels = tuple(index[val.classes[label]] for label in val.labels)
    return replace(val, classes=train.classes, labels=labels)  # type: ignore[type-var]
