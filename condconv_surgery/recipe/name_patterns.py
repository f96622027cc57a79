"""Patterns of layer names: a glob (``layer4.*``), or ``re:`` and a regular expression, for the whole name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from condconv_surgery.errors import InputError, nearest


def matches(name: str, pattern: str) -> bool:
    """Does ``pattern`` match the whole of ``name``?"""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def patterns_of(value: object) -> tuple[Any, ...]:
    """A single text or function is one pattern, ``None`` is none. Raises ``InputError`` for what is not iterable."""
    if value is None:
        return ()
    if isinstance(value, str) or callable(value):
        return (value,)
    if not isinstance(value, Iterable):
        raise InputError(
            f"{value!r} is not a pattern.", "A pattern is a text; a list may hold several.", '["layer4.*"]'
        )
    return tuple(value)


def as_argument(name: str, patterns: Iterable[object]) -> str:
    """The patterns as one would type them: ``include=["layer4.*"]``."""
    texts = (f'"{p}"' if isinstance(p, str) else getattr(p, "__name__", repr(p)) for p in patterns)
    return f"{name}=[{', '.join(texts)}]"


def require_pattern(argument: str, pattern: object) -> None:
    """Raise ``InputError`` for what is no pattern: an empty text, or a regular expression that does not compile."""
    if not isinstance(pattern, str) or not pattern:
        raise InputError(
            f"{as_argument(argument, [pattern])} is empty.",
            "A pattern names layers.",
            f'{argument}=["layer4.*"]',
        )
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise InputError(
                f"{as_argument(argument, [pattern])} is not a regular expression: {error}.",
                "After re: comes a Python regular expression.",
                f'{argument}=["re:layer[34]\\..*"]',
            ) from error


def require_matches(option: str, patterns: Iterable[object], names: Sequence[str]) -> None:
    """Raise ``InputError`` for a text that matches none of ``names``: a misspelt one would choose other layers."""
    for pattern in patterns:
        if isinstance(pattern, str) and not any(matches(name, pattern) for name in names):
            raise InputError(
                f"{as_argument(option, [pattern])} matches none of {len(names)} layers.",
                f"A pattern is for the whole name: {', '.join(nearest(pattern, names) or names[:3])}",
                as_argument(option, [_nearest_pattern(pattern, names)]),
            )


def _nearest_pattern(pattern: str, names: Sequence[str]) -> str:
    """A pattern that matches: all of the module that is named, else the most similar module or layer."""
    parts = [name.split(".") for name in names]
    modules = dict.fromkeys(".".join([*own[:end], "*"]) for own in parts for end in range(1, len(own)))
    whole = f"{pattern.rstrip('.*')}.*"
    return whole if whole in modules else (nearest(pattern, [*modules, *names], 1) or [names[-1]])[0]
