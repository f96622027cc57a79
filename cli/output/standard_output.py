"""stdout as commands write it: in any encoding, and with an error in words where it cannot be written."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from condconv_surgery.errors import SurgeryError


class _StandardOutput(io.TextIOWrapper):
    """Escapes what its encoding cannot hold. Raises SurgeryError where the disk behind it is full.

    A closed pipe stays a BrokenPipeError, at which the command ends without a word.
    """

    def write(self, text: str) -> int:
        with _named(self):
            return super().write(text)

    def flush(self) -> None:
        with _named(self):
            super().flush()


@contextmanager
def _named(stream: io.TextIOWrapper) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # Python writes what is still buffered again at its exit
        os.close(nowhere)
        raise SurgeryError(
            f"The output cannot be printed: {error.strerror}.",
            "Only what is printed is lost: each file that the command wrote before it is whole.",
            "the same command with its output in a pipe or on another disk",
        ) from error


def use_standard_output() -> None:
    """Replace ``sys.stdout``, unless something else than Python's own stream stands there."""
    own = sys.stdout
    if type(own) is io.TextIOWrapper:
        encoding, buffered = own.encoding, own.line_buffering
        sys.stdout = _StandardOutput(own.detach(), encoding, "backslashreplace", line_buffering=buffered)
