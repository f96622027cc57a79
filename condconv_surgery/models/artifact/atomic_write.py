"""Replace a file at once: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from condconv_surgery.errors import InputError

FULL = 1 << 16
"""Bytes of free space below which a disk counts as full: a write that failed has filled it."""


class FullDiskError(InputError):
    """A path on a disk without space left. The input may be right: the work failed."""

    exit_code = 1


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
            raise _not_written(path, error) from error
    finally:
        with suppress(OSError):  # it is gone, or on a read-only disk, which the first error says
            temporary.unlink()


@contextmanager
def replacing_files(path: Path, size: int = 0) -> Iterator[Path]:
    """As ``replacing``, for a writer that makes more files beside its own: yields a path of that name to write to.

    Every file in the folder of that path is flushed and renamed into the folder of ``path``, ``path`` as the last one.
    size: about how many bytes they take, for which there must be space.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.folder.tmp")
    try:
        try:
            folder.mkdir()
            _require_space(path, size)
            yield folder / path.name
            for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                with replacing(path.with_name(written.name)) as temporary:
                    written.replace(temporary)
        except FullDiskError:
            raise
        except Exception as error:  # what a writer raises for a full disk may be of any class
            if isinstance(error, OSError) or _says_full(error) or _is_full(path.parent):
                raise _not_written(path, error) from error
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise FullDiskError(
            f"{path} could not be written: {free / 1e6:.1f} MB are free in {path.parent}.",
            f"The file takes about {size / 1e6:.1f} MB. What was there before is unchanged.",
            "another path, or free some space",
        )


def _says_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in f"{error}"


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < FULL


def _not_written(path: Path, error: Exception) -> InputError:
    """The error for a file that could not be written; to be made before what was written of it is removed."""
    full, why = _says_full(error), f"{error}"
    if not full and not isinstance(error, OSError) and _is_full(path.parent):
        full, why = True, f"no space is left in {path.parent}"
    return (FullDiskError if full else InputError)(
        f"{path} could not be written: {why}.",
        "Its folder must exist and be writable, with space left. What was there before is unchanged.",
        "another path, or free some space" if full else "another path",
    )
