"""The errors of the package, each with three parts: what was given, what is allowed, what to write next.

Messages name Python arguments (``include=["layer4.*"]``); the command line prints them as its flags and exits with
``exit_code``: 2 for wrong input, 1 when the work itself failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SurgeryError(Exception):
    """Base of all errors that the package raises on purpose.

    given: what is wrong. allowed: what is possible instead. fix: what to write, printed after ``Try:``.
    """

    exit_code = 1

    def __init__(self, given: str, allowed: str = "", fix: str = "") -> None:
        self.given = given
        self.allowed = allowed
        self.fix = fix
        parts = [given, allowed, f"Try: {fix}" if fix else ""]
        super().__init__("\n  ".join(part for part in parts if part))

    def __reduce__(self) -> tuple[type[SurgeryError], tuple[str, str, str]]:
        return type(self), (self.given, self.allowed, self.fix)  # can be pickled, for other processes


class InputError(SurgeryError, ValueError):
    """The input is wrong: an unknown name, an argument out of range, another kind of file, a folder without images."""

    exit_code = 2


class ProofError(SurgeryError):
    """The converted model does not compute the same function as the original."""


class DamagedFileError(SurgeryError):
    """A file of the right kind that is truncated, altered or from a newer version."""


class TrainingError(SurgeryError):
    """Training cannot continue: a non-finite loss, no memory, a state that does not fit the run."""


class DivergedError(TrainingError):
    """A loss or a gradient is not finite, usually because the learning rate is too large."""


def require_at_least_one(name: str, value: int, example: int) -> None:
    """Raise ``InputError`` for an argument that counts something and is less than 1."""
    if value < 1:
        raise InputError(f"{name} is {value}.", "It must be at least 1.", f"{name}={example}")


def one_line(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def listed(names: Sequence[str]) -> str:
    """The first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most similar to ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def unknown_name(what: str, name: str, known: Iterable[str], fix: str = "") -> InputError:
    """The error for a name that is not in a closed list; it shows the nearest known names, else the first twelve."""
    names = sorted(known)
    close = nearest(name, names)
    shown = ", ".join(close) if close else ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return InputError(
        f"Unknown {what} {name!r}.",
        f"{'Nearest' if close else 'Known'}: {shown}" + (f" (of {len(names)})" if len(names) > 12 else ""),
        fix,
    )
