"""Options of a command made from the rules of the training recipe: flag, type, default and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import typer

from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.recipe.option_rules import Rule, all_rules

C = TypeVar("C", bound=Callable[..., None])


def with_rule_options(command: C) -> C:
    """``command`` with an option in place of its ``**flags`` for each rule that has a flag."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    generated = [_parameter(path, rule) for path, rule in _flagged_rules().items()]
    first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    last = [p for p in own if p.kind is p.KEYWORD_ONLY]
    command.__signature__ = inspect.Signature([*first, *generated, *last])  # type: ignore[attr-defined]
    return command


def flags_that_are_set(flags: dict[str, Any], ctx: typer.Context) -> list[tuple[str, str, Any]]:
    """(section, name, value) of the generated options that the user typed."""
    typed = []
    for path, rule in _flagged_rules().items():
        name = _parameter_name(path, rule)
        if is_typed(name, ctx):
            section, _, field = path.rpartition(".")
            typed.append((section, field, flags[name]))
    return typed


def is_typed(name: str, ctx: typer.Context) -> bool:
    """Whether the user typed the parameter ``name``, also where it equals its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _flagged_rules() -> dict[str, Rule]:
    return {path: rule for path, rule in all_rules(TrainingOptions).items() if rule.flag}


def _parameter_name(path: str, rule: Rule) -> str:
    """``data.batch_size`` has ``--batch-size`` and is called ``batch_size``; ``-o`` is called ``output``."""
    return rule.flag[2:].replace("-", "_") if rule.flag.startswith("--") else path.rpartition(".")[2]


def _parameter(path: str, rule: Rule) -> inspect.Parameter:
    name = _parameter_name(path, rule)
    spellings = [rule.flag] if rule.flag.startswith("--") else [rule.flag, f"--{name}"]
    kind: Any = list[rule.kind] if rule.many else rule.kind  # type: ignore[name-defined]
    annotation = Annotated[kind | None, typer.Option(*spellings, help=_help(rule))]
    default = _default(path)
    default = None if default in ("", ()) else default  # an empty string or list means that the option is not set
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(path: str) -> Any:
    value: Any = asdict(TrainingOptions())
    for key in path.split("."):
        value = value[key]
    return value


def _help(rule: Rule) -> str:
    text = rule.help
    if text.split()[0].isalpha() and text[0].islower():
        text = text[0].upper() + text[1:]
    choices = f" One of: {', '.join(rule.choices)}." if rule.choices else ""
    return f"{text}.{choices}{' Repeatable.' if rule.many else ''}"
