"""Labelled images of any data set: the common interface, the split by a seed, an even subset, matching of classes."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from condconv_surgery.data.decode_image import decode_image
from condconv_surgery.errors import InputError, listed, require_at_least_one

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

    def decode(self, index: int, channels: int = 3, least: int = 0) -> Image.Image:
        """One image as ``decode_image`` makes it. Raises ``UnreadableImageError``."""
        return decode_image(lambda: self.open(index), channels, self.name(index), least)

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
            digest.update(f"{self.key(index)}\0{label}\n".encode(errors="surrogateescape"))
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


def split(images: L, val_fraction: float, seed: int, groups: Sequence[int] | None = None) -> tuple[L, L]:
    """Training and validation images: of each class ``val_fraction``, at least one image, is for validation.

    The seed and the class name choose them. groups: a number for each image; images of one group stay together, whole
    groups are chosen until a class has its share. Raises ``InputError`` for a class of fewer than two images or groups.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(images.labels):
        members.setdefault(label, []).append(index)
    held_out = set[int]()
    val: list[int] = []
    for label, name in enumerate(images.classes):
        indices = members.get(label, [])
        if not indices:  # a set by name may declare classes that it has no images of
            continue
        if len(indices) < 2:
            raise InputError(
                f"The class {name} has one image only.",
                "A split needs two of each class: one to train on, one to validate on.",
                "add images, or make the folders train and val yourself",
            )
        random.Random(f"{seed}/{name}").shuffle(indices)
        count = min(max(round(len(indices) * val_fraction), 1), len(indices) - 1)
        if groups is None:
            val += indices[:count]
        else:
            _hold_out(indices, groups, count, held_out, name)
    if groups is not None:
        val = [index for index, group in enumerate(groups) if group in held_out]
    chosen = set(val)
    return images.subset([i for i in range(len(images)) if i not in chosen]), images.subset(sorted(val))


def _hold_out(indices: Sequence[int], groups: Sequence[int], count: int, held_out: set[int], name: str) -> None:
    """Add groups to ``held_out`` until it has ``count`` of the images ``indices``; one group at least is left over."""
    own = list(dict.fromkeys(groups[index] for index in indices))
    if len(own) < 2:
        raise InputError(
            f"All images of the class {name} are equal or nearly equal.",
            "A split needs two different images of each class.",
            "data.group_duplicates=False, or make the folders train and val yourself",
        )
    sizes = {group: sum(groups[index] == group for index in indices) for group in own}
    for group in own:
        taken = sum(sizes[g] for g in own if g in held_out)
        spare = [g for g in own if g not in held_out]
        if taken >= count or len(spare) < 2:
            return
        if group in spare and (taken + sizes[group] <= 1.5 * count or not taken):
            held_out.add(group)


def even_subset(images: L, limit: int) -> L:
    """At most ``limit`` images, evenly from all classes: the first of each class, then the second, ...; in order."""
    require_at_least_one("limit", limit, 1000)
    seen = [0] * len(images.classes)
    ranked = []
    for index, label in enumerate(images.labels):
        ranked.append((seen[label], label, index))
        seen[label] += 1
    return images.subset(sorted(index for _, _, index in sorted(ranked)[:limit]))


def with_classes_of(train: LabelledImages, val: L, where: str) -> L:
    """``val`` with the class numbers of ``train``. Raises ``InputError`` for a class that ``train`` does not have."""
    if val.classes == train.classes:  # two classes may have one name: ImageNet has two kinds of crane
        return val
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


def logit_of_each_class(folder: tuple[str, ...], model: tuple[str, ...]) -> Tensor | None:
    """The index in the logits of each class of the folder, if the model has all their names."""
    if not model or not set(folder) <= set(model):
        return None
    if folder == model:  # with two classes of one name, too
        return torch.arange(len(model))
    return torch.tensor([model.index(name) for name in folder])


def assumed_order(classes: tuple[str, ...]) -> str:
    """What to say where a model names no classes, and has as many logits as the data have classes."""
    numbered = [f"{index} {name}" for index, name in enumerate(classes)]
    return f"The model names no classes: its logits are taken to be, in order, {listed(numbered)}."
