"""Write and read the files of a run; each write is atomic."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.models.artifact.atomic_write import replacing
from condconv_surgery.recipe.toml_text import RECIPE


@contextmanager
def failing_resumably() -> Iterator[None]:
    """Turn a failure to write a file into ``TrainingError``: the run can be resumed."""
    try:
        yield
    except InputError as error:
        raise TrainingError(
            error.given,
            "The file is as it was before.",
            "make room for it, then the same run with resume=True",
        ) from error


def new_run(folder: Path, changes: str = "") -> str:
    """The advice to begin a new run with the options of the one in ``folder``, and ``changes`` of them."""
    recipe = folder / RECIPE
    options = f"the options of {shlex.quote(str(recipe))} with " if recipe.is_file() else ""
    return f'a new run: {options}{changes}{", " if changes else ""}output="RUN"'


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
    """The rows of a ``.jsonl`` file before the first line that a kill has truncated or a disk damaged."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # bytes that are no text too
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows as a ``.jsonl`` file."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
