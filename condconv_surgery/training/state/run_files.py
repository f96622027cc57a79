"""Write and read the files of a run; each write is atomic."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.models.artifact.atomic_write import replacing


@contextmanager
def failing_resumably() -> Iterator[None]:
    """Turn a failure to write a file into ``TrainingError``: the run can be resumed."""
    try:
        yield
    except InputError as error:
        raise TrainingError(
            error.given,
            "The file is as it was before.",
            "free space or change the permissions, then the same run with resume=True",
        ) from error


def write_text(path: Path, text: str) -> None:
    """``text`` as a whole file."""
    with failing_resumably(), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source: Path, path: Path) -> None:
    """The content of ``source`` as a whole file."""
    with failing_resumably(), replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def make_folder(path: Path) -> None:
    """Create the run's folder and check that it can be written. Raises ``InputError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(folder: Path, error: OSError) -> InputError:
    """The error for a run's folder in which no file can be made or filled."""
    return InputError(
        f"{folder} cannot be written: {error.strerror or error}.",
        "The output must be a folder that can be created or written, with space left.",
        'output="RUN"',
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` file; a last line that a kill truncated is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows as a ``.jsonl`` file."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
