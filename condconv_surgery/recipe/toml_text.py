"""Training options as a TOML file to read, edit and run again."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.option_rules import ALL_OPTIONS, Section, rules
from condconv_surgery.recipe.training_options import TrainingOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE = "recipe.toml"
"""The file of a run that holds all of its options."""

PRINT_ONE = f"{ALL_OPTIONS} prints one"
"""The advice on a recipe that cannot be read, unless the caller knows better."""


def to_toml(options: TrainingOptions) -> str:
    """Every option with its help as a comment; an option that is not set is a commented line."""
    lines = ["# Options of condconv finetune. Run again: condconv finetune --recipe THIS_FILE -o RUN", ""]
    lines += _section_lines(options)
    for name, section in options.sections().items():
        lines += ["", f"[{name}]", *_section_lines(section)]
    return "\n".join(lines) + "\n"


def read_recipe_file(path: Path, fix: str = PRINT_ONE) -> TrainingOptions:
    """The options in a TOML file. Raises ``InputError``, with ``fix`` where it cannot be read or is not TOML."""
    try:
        return from_toml(path.read_text(encoding="utf-8"), str(path), fix)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            "It must be a recipe that finetune wrote.",
            fix,
        ) from error


def from_toml(text: str, name: str = "the recipe", fix: str = PRINT_ONE) -> TrainingOptions:
    """The inverse of ``to_toml``; options left out keep their defaults. Raises ``InputError``."""
    return TrainingOptions.from_dict(parse_toml(text, name, fix))


def parse_toml(text: str, name: str, fix: str = PRINT_ONE) -> dict[str, Any]:
    """TOML as nested plain values."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(
            f"{name} is not TOML: {error}.",
            "A recipe is a TOML file with the options of a training run.",
            fix,
        ) from error


def parse_setting(setting: str) -> tuple[str, str, Any]:
    """``optimizer.lr=0.01`` as (section, name, value); the value is parsed as TOML, else it is a string.

    >>> parse_setting("optimizer.name=sgd")
    ('optimizer', 'name', 'sgd')
    >>> parse_setting("seed=3")
    ('', 'seed', 3)
    >>> parse_setting("augment.mixup=.2")
    ('augment', 'mixup', 0.2)
    """
    path, equals, text = setting.partition("=")
    section, _, name = path.strip().rpartition(".")
    if not equals or not name:
        raise InputError(f"{setting!r} is not an option.", "It must be SECTION.NAME=VALUE.", "optimizer.lr=0.001")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
        if re.fullmatch(r"[+-]?(\d+\.|\.\d+)(e[+-]?\d+)?", value, re.IGNORECASE):
            value = float(value)  # ".5" and "5." are numbers to everybody but TOML
    return section, name, value


def _section_lines(section: Section) -> list[str]:
    lines = []
    for field in fields(section):
        rule = rules(type(section)).get(field.name)
        if rule is None:
            continue
        value = getattr(section, field.name)
        text = f"# {field.name} = ..." if value is None else f"{field.name} = {_literal(value)}"
        lines.append(f"{text}  # {rule.help}")
    return lines


def _literal(value: Any) -> str:
    """A value in TOML, which writes these types as JSON does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
