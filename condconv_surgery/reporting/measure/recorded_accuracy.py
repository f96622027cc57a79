"""Read the accuracy that a training run recorded beside its artifacts."""

from __future__ import annotations

import json
from pathlib import Path

METRICS = "metrics.jsonl"


def recorded_accuracy(artifact: str | Path) -> float | None:
    """Validation top-1, 0 to 1, of ``best.safetensors`` or ``last.safetensors`` in a run directory, else ``None``."""
    path = Path(artifact)
    if path.stem not in ("best", "last") or not path.is_file():
        return None
    rows = _rows(path.parent / METRICS)
    chosen = [row for row in rows if row.get("best")] if path.stem == "best" else rows
    value = chosen[-1].get("val_top1") if chosen else None
    return float(value) if isinstance(value, (int, float)) else None


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
