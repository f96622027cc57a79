"""The folder of a study: its record, the folders of its runs, and whether it may be continued."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from condconv_surgery.data.evaluation_images import IMAGES
from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.training.state.resume import flattened
from condconv_surgery.training.state.run_files import write_text
from condconv_surgery.training.state.run_state import BEFORE, LAST

RECORD = "study.json"
QUICK_SETTINGS = "settings.json"
SHOWN = 60
"""Characters of a value in a message."""


def read_record(folder: Path) -> StudyRecord | None:
    """The record in the folder, if there is one. Raises ``DamagedFileError``."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read: {error}.",
            "It is the JSON that compare writes.",
            'a new study: another output="STUDY"',
        ) from error
    return StudyRecord.from_dict(data["record"] if isinstance(data, dict) and "record" in data else data)


def write_record(folder: Path, record: StudyRecord) -> None:
    """Write the record, atomically."""
    write_text(folder / RECORD, json.dumps({"record": record.to_dict()}, indent=1, allow_nan=False) + "\n")


def require_same_study(before: StudyRecord, settings: dict[str, Any], folder: Path) -> None:
    """Raise ``InputError`` when a study began with other settings. More seeds may be added."""
    old, new = flattened(before.settings), flattened(settings)
    changed = _changed(old, new)
    if isinstance(old.get("seeds"), int) and old["seeds"] <= new["seeds"]:
        changed = [name for name in changed if name != "seeds"]
    if "arms" in changed:  # of arms that one of the two lacks, the name says enough
        changed = [name for name in changed if not name.startswith("arm.")]
    if changed:
        raise InputError(
            f"{folder} holds a study with other settings: {_changes(old, new, changed)}.",
            "A study is continued with the same model, images, arms and options; only seeds may be added.",
            f'the same options, or a new study: another output="STUDY" (or: rm -r {shlex.quote(str(folder))})',
        )


def read_quick_settings(folder: Path) -> dict[str, Any] | None:
    """The settings with which a quick check began in the folder; empty for runs without any. Raises as above."""
    path = folder / QUICK_SETTINGS
    if not path.exists():
        return {} if folder.exists() and any(folder.glob(f"*/{LAST}")) else None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings, dict):
            return settings
        error: object = f"it holds a {type(settings).__name__}"
    except (OSError, ValueError) as reason:
        error = reason
    raise DamagedFileError(
        f"{path} cannot be read: {error}.",
        "It is the JSON object that compare writes.",
        f'a new quick check: another output="STUDY" (or: rm -r {shlex.quote(str(folder))})',
    )


def write_quick_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a quick check, atomically."""
    write_text(folder / QUICK_SETTINGS, json.dumps(settings, indent=1, allow_nan=False) + "\n")


def require_same_quick_check(before: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Raise ``InputError`` when a quick check began with other settings. Its epochs are none of them."""
    old, new = flattened(before), flattened(settings)
    if changed := _changed(old, new):
        raise InputError(
            f"{folder} holds a quick check with other settings: {_changes(old, new, changed)}.",
            "A quick check is repeated with the same model, images and options; only epochs may differ.",
            f'the same options, or a new quick check: another output="STUDY" (or: rm -r {shlex.quote(str(folder))})',
        )


def remove_states(run: Path) -> None:
    """Remove what a completed run no longer needs: what it is resumed from, and the weights that are not the best."""
    for name in (LAST, BEFORE, IMAGES, "last.safetensors"):
        (run / name).unlink(missing_ok=True)


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _changes(old: dict[str, Any], new: dict[str, Any], changed: list[str]) -> str:
    """What the first changed settings were and are."""
    what = ", ".join(f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}" for name in changed[:4])
    return f"{what}{', ...' if len(changed) > 4 else ''}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
