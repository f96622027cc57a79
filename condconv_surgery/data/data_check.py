"""The data check: what a run would be trained and validated on, and what is wrong with it, in ten lines at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from condconv_surgery.data.decode_image import diagnosis, reduce_jpeg, strict_pillow
from condconv_surgery.data.duplicates import CHECKED_SIDE, Looks, duplicates, looks_of
from condconv_surgery.data.evaluation_images import is_run, options_of
from condconv_surgery.data.find_data import DividedData, divide, find_parts, require_data, source_of
from condconv_surgery.data.labelled_images import LabelledImages, even_subset
from condconv_surgery.errors import InputError, listed
from condconv_surgery.models.eight_bits import is_deep
from condconv_surgery.models.preprocess import to_channels
from condconv_surgery.recipe.training_sections import DataOptions

THREADS = 4
BEFORE_A_RUN = 2000  # images of each part, evenly from all classes


@dataclass(frozen=True)
class DataCheck:
    """Facts about the images of a run.

    train, val, classes: numbers of images and the class names. counts, val_counts: training and validation images of
    each class.
    validation: where the validation images come from. checked: how many images were decoded; the facts below are about
    these. sizes: smallest, median and largest (width, height) by area. modes: converted modes, by name.
    skipped: files that are not read, unreadable: images that cannot be decoded; both by reason.
    unreadable_images: the reason by name.
    equal, near: validation images that are equal, or nearly equal, to a training image.
    duplicate_names: some of these. split_off: as in ``DividedData``.
    """

    train: int
    val: int
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    val_counts: tuple[int, ...]
    validation: str
    checked: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    modes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)
    unreadable_images: dict[str, str] = field(default_factory=dict)
    equal: int = 0
    near: int = 0
    duplicate_names: tuple[str, ...] = ()
    split_off: bool = False

    @property
    def without_training(self) -> tuple[str, ...]:
        """Classes that no training image shows."""
        return tuple(name for name, count in zip(self.classes, self.counts, strict=True) if not count)

    @property
    def without_validation(self) -> tuple[str, ...]:
        """Classes that training images show, and no validation image."""
        both = zip(self.classes, self.counts, self.val_counts, strict=True)
        return tuple(name for name, trained, validated in both if trained and not validated)

    def to_dict(self) -> dict[str, Any]:
        absent = {"without_training": self.without_training, "without_validation": self.without_validation}
        return asdict(self) | absent

    def lines(self) -> list[str]:
        """The check as at most ten lines."""
        low, high = (self.counts.index(pick(self.counts)) for pick in (min, max))
        part = "" if self.checked >= self.train + self.val else f", {self.checked} of them checked"
        lines = [
            f"Data: {self.train} training and {self.val} validation images in {len(self.classes)} classes{part}.",
            f"Classes: smallest {self.classes[low]} ({self.counts[low]}), largest {self.classes[high]} "
            f"({self.counts[high]} training images).",
            f"Validation: {self.validation}",
            *_without("training", "which cannot be learnt", self.without_training, len(self.classes)),
            *_without("validation", "which top-1 does not measure", self.without_validation, len(self.classes)),
        ]
        if self.sizes:
            small, middle, large = (f"{width}x{height}" for width, height in self.sizes)
            lines.append(f"Sizes: {small}" if small == large else f"Sizes: {small} to {large}, median {middle}")
        for title, found in (("Converted", self.modes), ("Skipped", self.skipped), ("Unreadable", self.unreadable)):
            if found:
                lines.append(f"{title}: {', '.join(f'{count} {name}' for name, count in _most(found))}")
        if self.unreadable_images:
            lines[-1] += f" ({listed(list(self.unreadable_images))})"
        if self.equal or self.near:
            grouped = "data.group_duplicates=True keeps them on one side of a split."
            lines.append(
                f"Duplicates: {self.equal} validation images equal a training image, {self.near} nearly "
                f"({self.duplicate_names[0]}). "
                + (grouped if self.split_off else "Remove them from one of the two parts.")
            )
        return lines


def check_data(source: str | DataOptions, *, seed: int = 0, limit: int | None = None) -> DataCheck:
    """Read the images that ``finetune`` would read and say what they are.

    source: what ``finetune`` takes as ``data``, or its options; or a run directory, for the data and the seed of that
    run. limit: at most so many images of each part are decoded, evenly from all classes. Raises ``InputError`` for data
    that cannot be used.
    """
    options = source if isinstance(source, DataOptions) else DataOptions(folder=source_of(source))
    if is_run(options.folder):
        run = options_of(Path(options.folder))
        options, seed = run.data, run.seed
    require_data(options)
    if options.streaming:
        raise InputError(
            "data.streaming=True in a data check.", "A stream is read once, in the run.", "data.streaming=False"
        )
    return describe(divide(find_parts(options), options, seed), limit)


def describe(divided: DividedData, limit: int | None = None) -> DataCheck:
    """The check of training and validation images that are found already."""
    train, val = divided.train, divided.val
    parts = [part if limit is None else even_subset(part, limit) for part in (train, val)]
    with strict_pillow(), ThreadPoolExecutor(THREADS) as pool:
        found = [list(pool.map(_looker(part), range(len(part)))) for part in parts]
    facts = [fact for part in found for fact in part]
    read = [fact for fact in facts if fact.looks is not None]
    areas = sorted((fact.size for fact in read), key=lambda size: size[0] * size[1])
    bad = [fact for fact in facts if fact.reason]
    val_read = [fact for fact in found[1] if fact.looks is not None]
    equal, near = duplicates(_looks(found[0]), _looks(found[1]))
    return DataCheck(
        len(train),
        len(val),
        train.classes,
        tuple(train.counts()),
        tuple(val.counts()),
        divided.origin,
        len(facts),
        (areas[0], areas[len(areas) // 2], areas[-1]) if areas else (),
        dict(Counter(fact.mode for fact in read if fact.mode)),
        _skipped(train, val),
        dict(Counter(fact.reason for fact in bad)),
        {fact.name: fact.reason for fact in bad},
        len(equal),
        len(near),
        tuple(val_read[index].name for index in sorted(equal | near)[:20]),
        divided.split_off,
    )


@dataclass(frozen=True)
class _Fact:
    name: str
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    reason: str = ""
    looks: Looks | None = None


def _looker(images: LabelledImages) -> Callable[[int], _Fact]:
    def look(index: int) -> _Fact:
        name = images.name(index)
        try:
            with images.open(index) as image:
                mode, stored = _mode(image), image.size
                reduce_jpeg(image, CHECKED_SIDE)
                upright = to_channels(image)
                turned = (upright.width < upright.height) != (stored[0] < stored[1])
                return _Fact(name, stored[::-1] if turned else stored, mode, "", looks_of(upright))
        except Exception as error:  # PIL's readers raise whatever the bytes lead them into
            return _Fact(name, reason=diagnosis(error)[0])

    return look


def _mode(image: Image.Image) -> str:
    """What is converted to 8-bit RGB or grey; empty for an image that is either already."""
    if is_deep(image):
        return "16-bit grey" if image.mode.startswith("I") else "float"
    names = {"P": "palette", "1": "black and white", "RGBA": "transparent", "LA": "transparent", "PA": "transparent"}
    frames = "animated (first frame)" if getattr(image, "is_animated", False) else ""
    return frames or names.get(image.mode, "" if image.mode in ("RGB", "L") else image.mode)


def _looks(facts: list[_Fact]) -> list[Looks]:
    return [fact.looks for fact in facts if fact.looks is not None]


def _skipped(train: LabelledImages, val: LabelledImages) -> dict[str, int]:
    """Of both folders, or once of the one that was split."""
    roots = {str(getattr(part, "root", "")): dict(getattr(part, "skipped", ())) for part in (train, val)}
    return dict(sum((Counter(found) for found in roots.values()), Counter[str]()))


def _without(part: str, effect: str, names: tuple[str, ...], classes: int) -> list[str]:
    """A line about classes that have no images in a part; none where every class has some."""
    return [f"Without {part} images: {listed(names)} ({len(names)} of {classes} classes), {effect}."] if names else []


def _most(found: dict[str, int], most: int = 5) -> Iterator[tuple[str, int]]:
    """The most frequent reasons, and the sum of the others."""
    ranked = sorted(found.items(), key=lambda item: -item[1])
    yield from ranked[:most]
    if len(ranked) > most:
        yield "of other kinds", sum(count for _, count in ranked[most:])
