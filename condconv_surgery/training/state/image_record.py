"""The images of a run, in order, in a file beside its state: a resumed run has the same, or says what has changed.

An unreadable image may be removed, repaired or replaced under its name. It stays in the order, where another image
stands in for it, so the run ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from condconv_surgery.data.evaluation_images import IMAGES, recorded_images
from condconv_surgery.data.image_folders import ImageFiles, printable
from condconv_surgery.errors import DamagedFileError, InputError, listed
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.batches.loaders import Data, open_data
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.state.run_files import new_run, write_text
from condconv_surgery.training.state.run_state import State


def write_image_record(folder: Path, train: object, val: object) -> None:
    """One line for each image of an image folder: part, class, and path from the folder of its part."""
    if isinstance(train, ImageFiles) and isinstance(val, ImageFiles):
        parts = _parts(train, val)
        rows = [[part, of.classes[label], of.files[i]] for part, of in parts for i, label in enumerate(of.labels)]
        write_text(folder / IMAGES, "".join(f"{json.dumps(row)}\n" for row in rows))


def with_recorded_images(
    data: Data, folder: Path, state: State, options: TrainingOptions, spec: InputSpec, world: World
) -> tuple[Data, list[str]]:
    """``data`` with the images that the run began with, and a note where some are gone.

    Raises ``InputError`` where more has changed than images that the run could not read.
    """
    train, val = data.train, data.val
    if state.facts["fingerprint"] == data.fingerprint() or not (folder / IMAGES).exists():
        return data, []
    if not isinstance(train, ImageFiles) or not isinstance(val, ImageFiles):
        return data, []
    try:
        rows = recorded_images(folder)
    except DamagedFileError:  # which images have changed cannot be told then, only that some have
        return data, []
    gone = _require_only_unreadable_gone(rows, train, val, state.facts.get("unreadable", []), folder)
    train, val = (of.recorded([row[1:] for row in rows if row[0] == part]) for part, of in _parts(train, val))
    again = open_data(options, spec, world, (train, val))
    divided = data.divided and replace(data.divided, train=train, val=val)
    if not gone:  # another division of the same images: another seed, say
        return replace(again, divided=divided), []
    were = "image was" if gone == 1 else "images were"
    note = f"{gone} unreadable {were} removed since the run began; the others keep their order."
    return replace(again, divided=divided), [note]


def _require_only_unreadable_gone(
    rows: Sequence[Sequence[str]], train: ImageFiles, val: ImageFiles, unreadable: Sequence[str], run: Path
) -> int:
    """The number of recorded images that are gone. Raises ``InputError`` for any other change."""
    split = train.root == val.root  # an image may be on another side now
    before = {("" if split else part, file): name for part, name, file in rows}
    now = {
        ("" if split else part, of.files[i]): of.classes[label]
        for part, of in _parts(train, val)
        for i, label in enumerate(of.labels)
    }
    roots = {"": train.root, **{part: of.root for part, of in _parts(train, val)}}
    gone, added = [key for key in before if key not in now], [key for key in now if key not in before]
    moved = [key for key in now if before.get(key, now[key]) != now[key]]
    lost = [(part, file) for part, file in gone if not _is_among(unreadable, roots[part], file)]
    if lost or added or moved:
        raise _changed(train.root if split else train.root.parent, added, lost, moved, run)
    return len(gone)


def _parts(train: ImageFiles, val: ImageFiles) -> tuple[tuple[str, ImageFiles], ...]:
    return ("train", train), ("val", val)


def _is_among(names: Sequence[str], root: Path, file: str) -> bool:
    """Is the file one of these names? The folder may have moved since."""
    tail = os.sep + printable(str(Path(root.name) / file))
    return any(name.endswith(tail) for name in names)


def _changed(folder: Path, added: list[Any], lost: list[Any], moved: list[Any], run: Path) -> InputError:
    kinds = ((added, "added"), (lost, "removed"), (moved, "in another class"))
    found = [f"{len(keys)} {kind} ({listed([printable(file) for _, file in keys])})" for keys, kind in kinds if keys]
    return InputError(
        f"The images in {folder} are not those that the run began with: {', '.join(found)}.",
        "On a resume an unreadable image may be removed or repaired; the others must have the same names, classes "
        "and split.",
        f"restore the folder, or {new_run(run)}",
    )
