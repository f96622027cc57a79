"""How an option is declared, once: its default, its meaning and its limits.

A section of options is a frozen dataclass whose fields are made by ``option``. The checks, the flags of the
command line with their help, and the TOML file with its comments are all read from there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from condconv_surgery.errors import InputError, unknown_name

ALL_OPTIONS = "to_toml(TrainingOptions())"
"""What error messages tell a user to call for a list of all options."""


@dataclass(frozen=True)
class Rule:
    """The meaning and the allowed values of an option.

    kind: ``int``, ``float``, ``bool`` or ``str``. many: a list of them. optional: ``None`` is allowed too.
    low, high: inclusive limits; with ``above`` the value must be larger than ``low``.
    choices: the only strings allowed. flag: its flag on the command line, else set by ``section.name=VALUE``.
    """

    help: str
    kind: type
    many: bool = False
    optional: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()
    flag: str = ""


def option(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    choices: tuple[str, ...] = (),
    flag: str = "",
) -> Any:
    """A dataclass field with a ``Rule``. The default's type is the kind; give it with ``None`` or ``()``."""
    many = isinstance(default, tuple)
    if kind is None:
        kind = type(default[0]) if many else type(default)
    rule = Rule(help, kind, many, default is None, low, high, above, choices, flag)
    return field(default=default, metadata={"rule": rule})


S = TypeVar("S", bound="Section")


@dataclass(frozen=True)
class Section:
    """Base of a group of options: checks each field against its rule when made.

    Raises ``InputError`` for a value of another type or outside the limits. title: its name in a recipe file.
    """

    title: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)).items():
            value = getattr(self, name)
            if rule.many and isinstance(value, list):
                value = tuple(value)
            if rule.kind is float and not rule.many and type(value) is int:
                value = float(value)
            if rule.many and rule.kind is float and isinstance(value, tuple):
                value = tuple(float(v) if type(v) is int else v for v in value)
            object.__setattr__(self, name, value)
            if not _fits(value, rule):
                path = f"{self.title}.{name}" if self.title else name
                default = next(f.default for f in fields(self) if f.name == name)
                raise InputError(
                    f"{path} is {value!r}.", f"It must be {_allowed(rule)}.", _example(path, rule, default)
                )

    @classmethod
    def from_dict(cls: type[S], data: dict[str, Any]) -> S:
        """A section from plain values. Raises ``InputError`` for an unknown name, with the nearest known ones."""
        for name in data:
            if name not in rules(cls):
                raise unknown_name(f"option in [{cls.title}]", name, rules(cls), f"{ALL_OPTIONS} prints them all")
        return cls(**data)


def rules(section: type[Section]) -> dict[str, Rule]:
    """The rule of each option of a section, in order."""
    return {f.name: f.metadata["rule"] for f in fields(section) if "rule" in f.metadata}


def all_rules(section: type[Section]) -> dict[str, Rule]:
    """The rule of each option of a section and of the sections inside it, those as ``section.name``."""
    result = rules(section)
    for field_ in fields(section):
        inner: object = field_.default_factory
        if isinstance(inner, type) and issubclass(inner, Section):
            result |= {f"{inner.title}.{name}": rule for name, rule in rules(inner).items()}
    return result


def _fits(value: object, rule: Rule) -> bool:
    if value is None:
        return rule.optional
    if rule.many:
        return isinstance(value, tuple) and all(_fits_one(v, rule) for v in value)
    return _fits_one(value, rule)


def _fits_one(value: object, rule: Rule) -> bool:
    if type(value) is not rule.kind:
        return False
    if isinstance(value, bool):
        return True
    if isinstance(value, (int, float)):
        return math.isfinite(value) and rule.low <= value <= rule.high and not (rule.above and value == rule.low)
    return not rule.choices or value in rule.choices


def _allowed(rule: Rule) -> str:
    if rule.choices:
        return "one of: " + ", ".join(rule.choices)
    word = {int: "whole number", float: "number", bool: "true or false", str: "text"}[rule.kind]
    if rule.kind in (bool, str):
        return f"a list of {word}s" if rule.many else word
    limits = []
    if rule.low > -math.inf:
        limits.append(f"above {rule.low:g}" if rule.above else f"at least {rule.low:g}")
    if rule.high < math.inf:
        limits.append(f"at most {rule.high:g}")
    noun = f"a list of {word}s" if rule.many else f"a {word}"
    return f"{noun}, {' and '.join(limits)}" if limits else noun


def _example(path: str, rule: Rule, default: object) -> str:
    """An allowed value as a Python argument."""
    if default is None:
        return f"leave {path}= out"
    if rule.kind is str and rule.many:
        return f'{path}=["NAME"]'
    value = rule.choices[0] if rule.choices else default
    if isinstance(value, tuple):
        value = list(value)
    return f"{path}={value if isinstance(value, bool) else json.dumps(value)}"
