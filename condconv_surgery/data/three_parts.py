"""Three parts of a data set: to train on, to select with (validation), and a test part that selects nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from condconv_surgery.data.find_data import DataParts, find_parts
from condconv_surgery.data.labelled_images import LabelledImages, split
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_sections import DataOptions


@dataclass(frozen=True)
class ThreeParts:
    """``train``, ``val`` and ``test`` share no image. ``origin``: a sentence that says where each comes from."""

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    origin: str

    def fingerprints(self) -> dict[str, str]:
        """A hash of each part's images and labels."""
        return {name: getattr(self, name).fingerprint() for name in ("train", "val", "test")}


def find_three_parts(options: DataOptions, seed: int) -> ThreeParts:
    """Training, validation and test images of the data that ``options`` name.

    With folders ``train``, ``val`` and ``test`` (in any case) each is what it is called. Where only one of the last two
    is given it is the test part, and validation images are split off the training images by ``val_fraction`` and the
    seed. Without any, the data are split twice. Raises ``InputError`` for data that cannot be divided so.
    """
    if options.streaming:
        raise InputError(
            "data.streaming=True in a comparison.",
            "Each test image is scored by name in every run, which a stream does not offer.",
            "data.streaming=False",
        )
    parts = find_parts(options)
    held_out = parts.test or parts.val
    if held_out is None:
        return _split_twice(parts, options, seed)
    train, test = parts.train, parts.images(held_out)
    if parts.test is None or parts.val is None:
        return _split_off_validation(train, test, options, seed, held_out.where)
    val = parts.images(parts.val)
    names = [Path(where).name for where in (parts.where, parts.val.where, parts.test.where)]
    origin = f"{_counted(train, val, test)}: the parts {names[0]}, {names[1]} and {names[2]}."
    return ThreeParts(train, val, test, origin)


def _split_twice(parts: DataParts, options: DataOptions, seed: int) -> ThreeParts:
    images = parts.train
    few = [name for name, count in zip(images.classes, images.counts(), strict=True) if count < 3]
    if few:
        raise InputError(
            f"The class {few[0]} has fewer than three images.",
            "A comparison needs three of each class: to train on, to select with and to test.",
            "add images, or make the folders train, val and test yourself",
        )
    rest, test = split(images, options.val_fraction, seed)
    train, val = split(rest, options.val_fraction, seed)
    origin = f"{_counted(train, val, test)}: {parts.where} was split in three, class by class, by the seed {seed}."
    return ThreeParts(train, val, test, origin)


def _split_off_validation(
    rest: LabelledImages, test: LabelledImages, options: DataOptions, seed: int, where: str
) -> ThreeParts:
    train, val = split(rest, options.val_fraction, seed)
    origin = f"{_counted(train, val, test)}: {where} are the test part; the validation images were split off the rest."
    return ThreeParts(train, val, test, origin)


def _counted(train: LabelledImages, val: LabelledImages, test: LabelledImages) -> str:
    return f"{len(train)} training, {len(val)} validation and {len(test)} test images"
