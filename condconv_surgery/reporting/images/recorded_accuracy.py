"""Read the accuracy that a training run recorded beside its artifacts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from condconv_surgery.data.evaluation_images import CHECK, IMAGES, options_of, recorded_images
from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.sources import file_of_run

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RecordedAccuracy:
    """Validation top-1, 0 to 1, as a run recorded it. images, data: how many images, and of which data; if known.

    fingerprint: a hash of the classes and paths of its validation images; empty where the run did not record them.
    """

    top1: float
    images: int = 0
    data: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.top1 <= 1:
            raise InputError(f"The recorded top-1 is {self.top1}.", "It is a share, from 0 to 1.", "recorded=0.75")

    @property
    def where(self) -> str:
        """``360 validation images of digits``, as far as it is known."""
        count = f"{self.images} " if self.images else ""
        return f"{count}validation images of {self.data or 'unknown data'}"


def recorded_accuracy(artifact: str | Path) -> RecordedAccuracy | None:
    """Of ``best`` (also for the directory itself) or ``last.safetensors`` in a run directory, else ``None``."""
    path = Path(file_of_run(str(artifact)))
    if path.stem not in ("best", "last") or not path.is_file():
        return None
    rows = _rows(path.parent / METRICS)
    chosen = [row for row in rows if row.get("best")] if path.stem == "best" else rows
    value = chosen[-1].get("val_top1") if chosen else None
    if not isinstance(value, (int, float)):
        return None
    run = path.parent
    count = chosen[-1].get("val_images")
    scored = count if isinstance(count, int) and count else _validation_images(run)
    return RecordedAccuracy(float(value), scored, _data(run), _fingerprint(run))


def _validation_images(run: Path) -> int:
    try:
        return int(json.loads((run / CHECK).read_text(encoding="utf-8"))["val"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _fingerprint(run: Path) -> str:
    """Of the validation images that a run recorded, in any order."""
    try:
        rows = recorded_images(run) if (run / IMAGES).is_file() else []
    except DamagedFileError:
        return ""
    images = sorted(row for row in rows if row[0] == "val")
    return hashlib.sha256(json.dumps(images).encode()).hexdigest() if images else ""


def _data(run: Path) -> str:
    """The data of a run, and how its validation images were chosen where the data do not say."""
    try:
        options = options_of(run)
    except InputError:
        return ""
    return f"{options.data.folder}{f', {options.data.val}' if options.data.val else ''} (seed {options.seed})"


def _rows(path: Path) -> list[dict[str, object]]:
    """The complete lines of a file that a run may still be writing."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
