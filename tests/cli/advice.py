"""Type what an error advises: the line behind ``Try:``, applied to the command that raised it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from tests.conftest import Run

PLACEHOLDERS = {
    "FILE": "file.pt",
    "FILE.safetensors": "again.safetensors",
    "MODEL": "nets:tiny",
    "FOLDER": "images",
    "RUN": "again",
}


def require_help(
    condconv: Run,
    command: list[str],
    says: str = "",
    complete: Callable[[list[str]], list[str]] = lambda again: again,
) -> None:
    """The command fails, and the one that its error advises succeeds or has another reason to fail.

    says: how the advice begins. complete: what to add to the advised command.
    """
    code, _, error = condconv(*command)
    assert code in (1, 2), error
    reason, advice = reason_of(error), advice_in(error)
    assert advice, error
    assert advice.startswith(says)
    again = retried(_without_setting(command, advice), advice)
    assert again is not None, f"not a command: {advice}"
    code, _, error = condconv(*complete(again))
    assert code == 0 or reason_of(error) not in ("", reason), f"{advice!r} did not help: {error}"


def reason_of(error: str) -> str:
    """The first line of a printed error."""
    return error.partition("Error: ")[2].partition("\n")[0]


def advice_in(error: str) -> str:
    """The advice of a printed error."""
    return error.partition("Try: ")[2].splitlines()[0] if "Try: " in error else ""


def retried(command: list[str], advice: str) -> list[str] | None:
    """The command that the advice says to type; ``None`` where it names none.

    A whole command replaces it. Flags replace those of the same name, or are added; "leave --x out" removes it; a model
    replaces the model. Of alternatives ("or") the first that is one of these is taken.
    """
    advice = re.sub(r"^(a|the same) (new )?(run|study)( with |: )| with (?=-)", " ", advice).strip()
    for part in re.split(r"[,;]? or |, (?=[a-z])| +\(| where | to | {2,}| prints", advice):
        if (call := part.removeprefix("a new run: ")).startswith("condconv "):
            return [_filled(word) for word in shlex.split(call)[1:]]
        again: list[str] | None = command
        for step in part.removeprefix("another ").split(" and "):
            again = again and _applied(again, step)
        if again is not None:
            return again
    return None


def _without_setting(command: list[str], advice: str) -> list[str]:
    """The command without its last --set, whose value other flags correct."""
    if "--set" not in command or not re.search(r"(^|\s)--?\w", advice):
        return command
    last = len(command) - 1 - command[::-1].index("--set")
    return command[:last] + command[last + 2 :]


def _applied(command: list[str], part: str) -> list[str] | None:
    if match := re.match(r"leave (--[\w-]+) .*?out|no (--[\w-]+)$|leave it out", part):
        optional = ("--arch", "--num-classes", "--reduction")
        flag = match[1] or match[2] or next(word for word in optional if word in command)
        return without(command, flag)
    if part.startswith("-"):
        words = [_filled(word) for word in shlex.split(part.removesuffix(" as well"))]
        for flag in dict.fromkeys(word for word in words if is_flag(word)):
            command = command if part.endswith("as well") else without(command, flag)
        return [*command, *words]
    if re.fullmatch(r"[\w.]+:[\w.]+|[\w./-]+\.(safetensors|pt|bin)", part):
        return [command[0], part, *command[2:]]
    return None


def _filled(word: str) -> str:
    """A word with what stands for its placeholder, also as the value of a setting."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{PLACEHOLDERS.get(value, value)}"


def without(command: list[str], flag: str) -> list[str]:
    """The command without a flag and its values."""
    kept, skipping = [], False
    for word in command:
        if is_flag(word):
            skipping = word == flag
        if not skipping:
            kept.append(word)
    return kept


def is_flag(word: str) -> bool:
    return re.fullmatch(r"--?[a-z][\w-]*", word) is not None
