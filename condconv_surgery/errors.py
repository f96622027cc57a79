"""What went wrong, what is allowed, what to type next.

Every error that a user can cause has three parts. The command line prints them and ends with
``exit_code``: 2 when the input is wrong, 1 when the work itself failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SurgeryError(Exception):
    """Base of every error raised on purpose: ``given``, ``allowed`` and ``fix``, in words."""

    exit_code = 1

    def __init__(self, given: str, allowed: str = "", fix: str = "") -> None:
        self.given = given
        self.allowed = allowed
        self.fix = fix
        parts = [given, allowed, f"Try: {fix}" if fix else ""]
        super().__init__("\n  ".join(part for part in parts if part))

    def __reduce__(self) -> tuple[type[SurgeryError], tuple[str, str, str]]:
        return type(self), (self.given, self.allowed, self.fix)  # survives a trip between processes


class InputError(SurgeryError, ValueError):
    """The user's input is wrong: a name, a flag, a file of another kind, a folder without pictures."""

    exit_code = 2


class ProofError(SurgeryError):
    """The converted model does not compute what the original computes."""


class DamagedFileError(SurgeryError):
    """A file of the right kind whose content is truncated, altered or from a newer version."""


class TrainingError(SurgeryError):
    """Training could not go on: a non-finite loss, no memory, a state that does not fit the run."""


def one_line(error: BaseException) -> str:
    """The class of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def unknown_name(what: str, name: str, known: Iterable[str], fix: str = "") -> InputError:
    """The error for a name that is not in a closed list: says the nearest, then the known ones."""
    names = sorted(known)
    close = nearest(name, names)
    shown = ", ".join(close) if close else ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return InputError(
        f"Unknown {what} {name!r}.",
        f"{'Nearest' if close else 'Known'}: {shown}" + (f" (of {len(names)})" if len(names) > 12 else ""),
        fix,
    )
