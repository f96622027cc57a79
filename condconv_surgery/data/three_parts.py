"""Three parts of a data set: to train on, to select with (validation), and a test part that selects nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from condconv_surgery.data.find_data import find_data, is_shards
from condconv_surgery.data.image_folders import TRAIN_NAMES, require_folder, scan
from condconv_surgery.data.labelled_images import LabelledImages, split, with_classes_of
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_sections import DataOptions

VALIDATION_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test", "testing")


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
    kind = options.folder.partition(":")[0]
    if kind in ("torchvision", "hf") or is_shards(options.folder) or options.val:
        rest, test = find_data(options, seed)
        return _split_off_validation(rest, test, options, seed, f"the validation images of {options.folder}")
    return _of_folder(Path(options.folder), options, seed)


def _of_folder(folder: Path, options: DataOptions, seed: int) -> ThreeParts:
    require_folder(folder)
    train_root, val_root, test_root = (
        _subfolder(folder, names) for names in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES)
    )
    held_out = test_root or val_root
    if train_root is None or held_out is None:
        return _split_twice(train_root or folder, options, seed)
    train = scan(train_root)
    test = with_classes_of(train, scan(held_out, min_classes=1), str(held_out))
    if test_root is None or val_root is None:
        return _split_off_validation(train, test, options, seed, str(held_out))
    val = with_classes_of(train, scan(val_root, min_classes=1), str(val_root))
    origin = f"{_counted(train, val, test)}: the folders {train_root.name}, {val_root.name} and {test_root.name}."
    return ThreeParts(train, val, test, origin)


def _split_twice(root: Path, options: DataOptions, seed: int) -> ThreeParts:
    images = scan(root)
    few = [name for name, count in zip(images.classes, images.counts(), strict=True) if count < 3]
    if few:
        raise InputError(
            f"The class {few[0]} has fewer than three images.",
            "A comparison needs three of each class: to train on, to select with and to test.",
            "add images, or make the folders train, val and test yourself",
        )
    rest, test = split(images, options.val_fraction, seed)
    train, val = split(rest, options.val_fraction, seed)
    origin = f"{_counted(train, val, test)}: {root} was split in three, class by class, by the seed {seed}."
    return ThreeParts(train, val, test, origin)


def _split_off_validation(
    rest: LabelledImages, test: LabelledImages, options: DataOptions, seed: int, where: str
) -> ThreeParts:
    train, val = split(rest, options.val_fraction, seed)
    origin = f"{_counted(train, val, test)}: {where} are the test part; the validation images were split off the rest."
    return ThreeParts(train, val, test, origin)


def _counted(train: LabelledImages, val: LabelledImages, test: LabelledImages) -> str:
    return f"{len(train)} training, {len(val)} validation and {len(test)} test images"


def _subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The subfolder with one of ``names`` in upper or lower case; earlier names first."""
    found = {entry.name.lower(): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
    return next((found[name] for name in names if name in found), None)
