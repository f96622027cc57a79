"""Check that a run may be resumed from a state."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.state.run_files import new_run, read_rows, write_rows
from condconv_surgery.training.state.run_state import BEFORE, LAST, State

METRICS = "metrics.jsonl"

FREE = (
    *("model", "arch", "weights", "trust", "output"),
    *("data.folder", "data.val", "data.root", "data.workers", "data.max_bad"),
    *("engine.save_every", "schedule.epochs"),
)
"""Options that may differ after a resume: they name files, folders or costs, or extend the run."""

UNSET: tuple[Any, ...] = (None, "", [])
"""Values of options that nobody types."""


def require_fresh(folder: Path) -> None:
    """Raise ``InputError`` when ``folder`` already holds a run, which a repeated call would overwrite."""
    if any((folder / name).exists() for name in (LAST, BEFORE, METRICS)):
        raise InputError(
            f"{folder} already holds a run.",
            "A new run needs a folder of its own.",
            f'resume=True to continue it, or another output="RUN" (or: rm -r {shlex.quote(str(folder))})',
        )


def require_same_run(
    state: State, options: TrainingOptions, fingerprint: str, teacher: str, processes: int, steps: int, folder: Path
) -> None:
    """Raise ``InputError`` where images, teacher or options are not those of the state, or the run is past ``steps``.

    folder: of the run. teacher: hash of its weights; its file may have moved.

    The number of processes may differ, except with a stream, of which each process reads its own part.
    """
    before_processes = state.facts.get("processes", processes)
    if options.data.streaming and before_processes != processes:
        raise InputError(
            f"The run streams its images with {before_processes} processes and is resumed with {processes}.",
            "Each process reads its own part of a stream, so their number must be the same.",
            f"torchrun --nproc-per-node {before_processes}, or {new_run(folder)}",
        )
    before, now = flattened(state.facts["options"]), flattened(options.to_dict())
    before = {**flattened(TrainingOptions().to_dict()), **before}  # an older state lacks newer options
    taught_by = state.facts.get("teacher", "")
    free = (*FREE, "distill.teacher") if taught_by and taught_by == teacher else FREE
    changed = [name for name in now if name not in free and before[name] != now[name]]
    if changed:
        changes = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in changed)
        raise InputError(
            f"The run began with other options: {changes}.",
            f"On a resume only these may change: {', '.join(FREE)}.",
            f"{_as_before(before, changed)}, or {new_run(folder, _written(now, changed))}",
        )
    if taught_by and taught_by != teacher:
        raise InputError(
            f"The teacher {options.distill.teacher} is not the one that the run began with: its weights are others.",
            "An exact resume needs the same teacher; its file may have moved.",
            f"the file as it was then, or {new_run(folder)}",
        )
    if state.facts["fingerprint"] != fingerprint:
        raise InputError(
            f"The images in {options.data.folder} are not those that the run began with.",
            "Names, classes and split must be the same for an exact resume.",
            f"restore the folder, or {new_run(folder)}",
        )
    done, per_epoch = state.facts["progress"]["step"], steps // options.schedule.epochs
    if done > steps:
        epochs = -(-done // per_epoch)
        raise InputError(
            f"schedule.epochs={options.schedule.epochs}, but the run is at step {done}, in epoch {epochs}.",
            "A resumed run can be made longer, or shorter than planned, but not shorter than it is.",
            f"schedule.epochs={epochs} or more",
        )


def _as_before(options: dict[str, Any], names: list[str]) -> str:
    """What to write for some options to be these."""
    unset = [f"leave {name}=... out" for name in names if options[name] in UNSET]
    return " and ".join(part for part in (_written(options, names), *unset) if part)


def _written(options: dict[str, Any], names: list[str]) -> str:
    """Those of some options that are set, as a message writes them."""
    return ", ".join(f"{name}={options[name]!r}" for name in names if options[name] not in UNSET)


def began_with(state: State, heads: dict[str, int], model: nn.Module) -> dict[str, int]:
    """The heads that were new when the run of the state began; ``heads`` where the state is older than this fact."""
    names = dict(model.named_modules())
    return {name: width for name, width in state.facts.get("heads", heads).items() if name in names}


def cut_metrics(folder: Path, epochs_done: int) -> str:
    """Drop rows of epochs after the state: they will be trained again. Returns a note about rows that are lost."""
    rows = read_rows(folder / METRICS)
    kept = [row for row in rows if row.get("epoch", math.inf) <= epochs_done]
    if (folder / METRICS).exists():
        write_rows(folder / METRICS, kept)
    lost = epochs_done - len(kept)
    return f"{folder / METRICS} is damaged: the rows of {lost} of {epochs_done} epochs are lost." if lost > 0 else ""


def flattened(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by ``section.name``; tuples as lists."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
