"""One run at a time in a folder: a lock file that names process and host. The system frees it when the process dies.

On one machine, and on network file systems with locks, a second run sees the lock, and that of a process that was
killed is free at once. For hosts that do not see each other's locks the file alone tells: a run touches it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, ClassVar

from condconv_surgery.errors import InputError
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.state.run_files import cannot_write, make_folder

if sys.platform != "win32":  # there the file alone decides
    import fcntl

LOCK = "run.lock"
SILENT = 120.0
"""Seconds without a sign of life after which the run of another host counts as ended."""

BEAT = 10.0
"""Seconds between two signs of life."""


class RunLock:
    """The lock of a folder. ``acquire``, ``beat`` now and then, ``release``."""

    held: ClassVar = set[str]()
    """Real paths of the locks of this process: the system does not tell two runs of one process apart."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.file: IO[str] | None = None
        self.beaten = 0.0

    def acquire(self) -> str:
        """Take the lock. Returns a note about a run that ended without freeing it, else an empty string.

        Raises ``InputError`` when another run holds it, or the file cannot be filled.
        """
        if self._key() in self.held:
            raise self._taken({"pid": os.getpid(), "host": socket.gethostname()})
        file, locked = self._open()
        owner = _owner(file)
        here = owner.get("host") == socket.gethostname()
        if owner and not (here and locked) and time.time() - os.fstat(file.fileno()).st_mtime < SILENT:
            file.close()
            raise self._taken(owner)
        self.file, self.beaten = file, time.monotonic()
        self.held.add(self._key())
        try:
            self._write(file)
        except OSError as error:  # a full disk
            self.release()
            raise cannot_write(self.path.parent, error) from error
        return f"{_who(owner)} ended without freeing {self.path}; the lock is taken over." if owner else ""

    def beat(self) -> None:
        """A sign of life, at most every ``BEAT`` seconds."""
        if self.file is not None and time.monotonic() - self.beaten >= BEAT:
            self.beaten = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        if self.file is not None:
            self.held.discard(self._key())
            with suppress(OSError):  # a disk that has become read-only; the system frees the lock all the same
                self.path.unlink()
            self.file.close()
            self.file = None

    def _write(self, file: IO[str]) -> None:
        """Name the owner."""
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}
        file.seek(0)
        file.truncate()
        os.write(file.fileno(), json.dumps(owner).encode())  # not through the buffer, which closing would write again

    def _open(self) -> tuple[IO[str], bool]:
        """The file, and whether the system has locked it. One that was removed meanwhile is made again."""
        while True:
            try:
                file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
            except OSError as error:  # a folder of this name, or a file of another user
                raise cannot_write(self.path, error) from error
            if sys.platform == "win32":
                return file, False
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its children do not inherit it
            except (BlockingIOError, PermissionError):
                owner = _owner(file)
                file.close()
                raise self._taken(owner) from None
            except OSError:  # a file system without locks
                return file, False
            with suppress(FileNotFoundError):
                if self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    return file, True
            file.close()

    def _key(self) -> str:
        return str(self.path.resolve())

    def _taken(self, owner: dict[str, Any]) -> InputError:
        is_here = owner.get("host", socket.gethostname()) == socket.gethostname()
        silence = "" if is_here else f" One of another host counts as ended after {SILENT:.0f} seconds of silence."
        return InputError(
            f"{_who(owner)} writes into {self.path.parent}.",
            f"A folder holds one run at a time.{silence}",
            'another output="RUN"; or wait until it has ended, then resume=True',
        )


def _owner(file: IO[str]) -> dict[str, Any]:
    """Who wrote the file; empty for a new one, or one that a lock cannot be."""
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:  # new, or being written at this moment
        return {}
    known = isinstance(found, dict) and isinstance(found.get("pid"), int) and isinstance(found.get("host"), str)
    return found if known else {}


def _who(owner: dict[str, Any]) -> str:
    return f"The run of process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "Another run"


@contextmanager
def locked_folder(folder: Path, world: World, note: Callable[[str], object]) -> Iterator[RunLock]:
    """Create a run's folder and hold its lock, in the first process; a new folder that stays empty is removed again.

    Raises ``InputError`` in every process where the folder cannot be written, or another run holds it.
    """
    lock, is_new = RunLock(folder), not folder.exists()
    problem: InputError | None = None
    if world.is_first:
        try:
            make_folder(folder)
            if stale := lock.acquire():
                note(stale)
        except InputError as error:
            problem = error
    try:
        if (found := world.gather(problem)[0]) is not None:
            raise found
        yield lock
    finally:
        lock.release()
        if is_new and world.is_first:
            with suppress(OSError):
                folder.rmdir()  # an error came before anything was written
