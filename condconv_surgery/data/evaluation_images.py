"""The images to measure a model on: the validation part of some data, or the validation images of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from condconv_surgery.data.find_data import DividedData, divide, find_parts, folder_parts, is_folder, require_data
from condconv_surgery.data.image_folders import ImageFiles, printable, scan
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.recipe.toml_text import RECIPE, read_recipe_file
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.training_sections import DataOptions

CHECK, IMAGES = "data.json", "images.jsonl"
"""Files of a run directory beside its recipe: the data check before it, and its images in order."""


Facts = dict[str, Any]
"""Numbers of training and validation images, class names, and the numbers of each class."""


NOT_HELD_OUT = "The data have no validation part: the model may have been trained on these images."


class EvaluationImages(NamedTuple):
    """Labelled images. held_out: they come from a validation or test part. where: from which, in words."""

    images: LabelledImages
    held_out: bool
    where: str


def find_evaluation_images(options: DataOptions) -> EvaluationImages:
    """The validation part, else the test part, else all images; of a run directory the run's validation images.

    Raises ``InputError`` for data without labelled images.
    """
    if is_run(options.folder):
        return validation_images_of(Path(options.folder))
    require_data(options)
    parts = folder_parts(options) if is_folder(options) and not options.val else None
    if parts is not None:
        root = parts.val or parts.test or parts.train or parts.root
        return EvaluationImages(scan(root, min_classes=1), root in (parts.val, parts.test), str(root))
    found = find_parts(options)
    part = found.val or found.test
    if part is None:
        return EvaluationImages(found.train, False, found.where)
    return EvaluationImages(found.images(part), True, part.where)


def is_run(folder: str) -> bool:
    """Is it the directory of a run of ``finetune``?"""
    return (Path(folder) / RECIPE).is_file()


def data_to_measure(run: str) -> str:
    """The data for the model of a run: the run, for its validation images, or the set that it streamed."""
    data = options_of(Path(run)).data
    return data.folder if data.streaming else run


def options_of(run: Path) -> TrainingOptions:
    """The options of a run. Raises ``InputError`` when its recipe cannot be read."""
    return read_recipe_file(run / RECIPE, 'data="FOLDER", the images themselves')


def validation_images_of(run: Path) -> EvaluationImages:
    """The validation images of a run: those that it recorded, else those of the split by its recipe.

    Raises ``InputError`` when the data have changed since, so that others would be measured.
    """
    options, divided = _divided(run)
    if isinstance(divided.val, ImageFiles) and (run / IMAGES).is_file():
        return _recorded_validation(divided.val, run, options.data.folder)
    before, now = _recorded_facts(run), _facts(divided.train, divided.val)
    changed = {fact for fact in before.keys() & now.keys() if before[fact] != now[fact]}
    if changed:
        relabelled = "classes" in changed or not changed & {"train", "val"}
        others = ", with other classes or labels" if relabelled else ""
        counts = (
            f"{before['train']} training and {before['val']} validation images then, {now['train']} and {now['val']}"
        )
        raise InputError(
            f"The data of {run} have changed: {counts} now{others}.",
            "Their split is another one, with images that the run trained on." if divided.split_off else "",
            _other_data(options.data, divided.split_off),
        )
    return EvaluationImages(divided.val, True, f"{_from_here(options.data.folder)} (validation images of {run})")


def _other_data(data: DataOptions, split_off: bool) -> str:
    """What to type for images that a run did not train on, where its data have changed."""
    if split_off:
        return 'data="FOLDER" with images that the run did not train on'
    named = data.folder.partition(":")[0] in ("torchvision", "hf")  # val is then a part of this data set
    source = data.val if data.val and not named else data.folder
    return f'data="{source}", whose validation images the run did not train on'


def training_images_of(run: Path) -> LabelledImages:
    """The images that a run trains on, by its recipe."""
    return _divided(run)[1].train


def _divided(run: Path) -> tuple[TrainingOptions, DividedData]:
    """The options of a run, and its data divided by them. Raises ``InputError`` for a run that read a stream."""
    options = options_of(run)
    if options.data.streaming:
        raise InputError(
            f"The run {run} read a stream.",
            "The images of a stream are not listed.",
            f'data="{options.data.folder}", which lists its validation part',
        )
    require_data(options.data)
    return options, divide(find_parts(options.data), options.data, options.seed)


def _recorded_validation(val: ImageFiles, run: Path, folder: str) -> EvaluationImages:
    """The validation images that the run recorded and that are still there, with its classes.

    Images and classes may have been added or removed meanwhile.
    """
    rows = recorded_images(run)
    classes = tuple(dict.fromkeys(name for part, name, _ in rows if part == "train"))  # in order: the images are
    recorded = [(name, file) for part, name, file in rows if part == "val"]
    found = [(name, file) for name, file in recorded if (val.root / file).is_file()]
    if not found:
        raise InputError(
            f"None of the {len(recorded)} validation images of {run} is left in {val.root}.",
            f"{run / IMAGES} lists them.",
            'restore the folder, or data="FOLDER" with images that the run did not train on',
        )
    few = "" if len(found) == len(recorded) else f"{len(found)} of the {len(recorded)} "
    images = replace(val, classes=classes).recorded(found)
    return EvaluationImages(images, True, f"{_from_here(folder)} ({few}validation images of {run})")


def _from_here(folder: str) -> str:
    """A recipe has the absolute path of a folder: relative where it is below the current one."""
    here = Path.cwd()
    return str(Path(folder).relative_to(here)) if Path(folder).is_relative_to(here) else folder


def recorded_images(run: Path) -> list[tuple[str, str, str]]:
    """Part, class and path from the folder of its part, of each image that a run recorded, in its order.

    Raises ``DamagedFileError``.
    """
    try:
        rows = [json.loads(line) for line in (run / IMAGES).read_bytes().splitlines()]
        return [(str(part), str(name), str(file)) for part, name, file in rows]
    except (ValueError, TypeError) as error:
        raise DamagedFileError(
            f"{run / IMAGES} is damaged: {error}.",
            "It lists the images of the run, a line of JSON for each.",
            'data="FOLDER", images that the run did not train on',
        ) from error


def trained_images(run: Path, images: Iterable[str]) -> int:
    """How many of the image files ``images`` a run recorded among its training images; 0 where it recorded none."""
    if not (is_run(str(run)) and (run / IMAGES).is_file()):
        return 0
    try:
        parts = folder_parts(options_of(run).data)
        rows = recorded_images(run)
    except (InputError, DamagedFileError):
        return 0
    root = parts.train or parts.root
    trained = _real_paths(printable(str(root / file)) for part, _, file in rows if part == "train")
    return sum(path in trained for path in _real_paths(images))


def _real_paths(images: Iterable[str]) -> set[tuple[str, str]]:
    """Real folder and name of each file; a folder is resolved once."""
    resolved = cache(os.path.realpath)
    return {(resolved(path.parent), path.name) for path in map(Path, images)}


def _facts(train: LabelledImages, val: LabelledImages) -> Facts:
    per_class = {"classes": list(train.classes), "counts": train.counts(), "val_counts": val.counts()}
    return {"train": len(train), "val": len(val), **per_class}


def _recorded_facts(run: Path) -> Facts:
    """What the data check at the beginning of a run says of ``_facts``; nothing where it cannot be read."""
    try:
        check = json.loads((run / CHECK).read_text(encoding="utf-8"))
        return dict(check) if {"train", "val"} <= check.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}
