"""Replace a file at once: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from condconv_surgery.errors import InputError


def require_values(state: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for a tensor on the meta device: it has no values."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise InputError(
                f"{name} is on the meta device: it has no values.",
                "A file holds the values of every tensor.",
                "load the weights, then convert (or model.to_empty(device=...) and load the converted ones)",
            )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, flushed to disk and renamed when the block succeeds.

    The file has the permissions that ``open`` gives, or those of the file that it replaces. Raises ``InputError`` when
    it cannot be written; ``path`` is then unchanged and no temporary file remains.
    """
    if path.is_dir():  # Path("") too
        raise InputError(
            f"{path} could not be written: it is a folder.", "A file has a name.", f"{path / 'model.safetensors'}"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.touch()
            mode = (path if path.exists() else temporary).stat().st_mode
            yield temporary
            temporary.chmod(stat.S_IMODE(mode))  # safetensors makes files that only their owner may read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} could not be written: {error}.",
                "Its folder must exist and be writable, with space left. What was there before is unchanged.",
                "another path",
            ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_files(path: Path) -> Iterator[Path]:
    """As ``replacing``, for a writer that makes more files beside its own: yields a path of that name to write to.

    Every file in the folder of that path is flushed and renamed into the folder of ``path``, ``path`` as the last one.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.folder.tmp")
    try:
        try:
            folder.mkdir()
            yield folder / path.name
            for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                with replacing(path.with_name(written.name)) as temporary:
                    written.replace(temporary)
        except OSError as error:
            raise InputError(
                f"{path} could not be written: {error}.",
                "Its folder must exist and be writable, with space left.",
                "another path",
            ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
