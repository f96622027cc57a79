"""The data check before a run: printed, written into the run's folder, and an error for too many unreadable images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from condconv_surgery.data.data_check import BEFORE_A_RUN, DataCheck, describe
from condconv_surgery.data.find_data import DividedData
from condconv_surgery.training.batches.unreadable_images import UnreadableImages
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.state.run_files import write_text

CHECK = "data.json"


def report_check(
    divided: DividedData, folder: Path, unreadable: UnreadableImages, callback: Callback, world: World
) -> DataCheck:
    """Check the images in the first process; note the lines and write ``data.json``; count the unreadable images.

    Raises ``InputError`` in every process when more images than ``data.max_bad`` are unreadable.
    """
    found = world.gather(describe(divided, BEFORE_A_RUN) if world.is_first else None)[0]
    assert found is not None
    if world.is_first:
        write_check(found, folder, callback.note)
    unreadable.reasons.update(found.unreadable_images)
    unreadable.add(list(found.unreadable_images) if world.is_first else [])
    unreadable.share()
    return found


def write_check(found: DataCheck, folder: Path, note: Callable[[str], object]) -> None:
    """Note the lines of a check and write it into a folder."""
    for line in found.lines():
        note(line)
    write_text(folder / CHECK, json.dumps(found.to_dict(), indent=2) + "\n")
