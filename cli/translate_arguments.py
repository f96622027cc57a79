"""Turn the Python arguments in a library message into the flags of the running command.

The library says ``include=["layer4.*"]`` or ``engine.compile=True``; ``condconv`` prints ``--include "layer4.*"`` and
``--set engine.compile=true``.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import warnings
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

from condconv_surgery.errors import SurgeryError
from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.recipe.option_rules import ALL_OPTIONS, all_rules
from condconv_surgery.recipe.toml_text import parse_setting
from condconv_surgery.recipe.training_options import FINETUNE_CALL

CALLS = {
    'precision="bfloat16"': "--bf16",
    'precision="int8"': "--int8",
    'precision="exact"': "leave --bf16 and --int8 out",
    re.escape(ALL_OPTIONS): "condconv finetune --print-recipe",
    re.escape(FINETUNE_CALL): "condconv finetune MODEL --data FOLDER -o RUN",
    r"convert\(model, CondConv\(experts=4\)\)": "condconv convert MODEL -o FILE.safetensors",
    r'load_model\("package\.module:factory", weights="FILE"\), or .*': (
        "condconv convert package.module:factory --weights FILE -o FILE.safetensors"
    ),
    r"the options of ((?:'[^']*'|[^\s'])+) with ": r"condconv finetune --recipe \1 ",
    r'condconv_surgery\.load\("([^"\s]+)", base="FILE"\)': r"condconv import \1 --base FILE -o FILE.safetensors",
    r'(?:condconv_surgery\.)?load_model\("([^"\s]+)"\)': r"condconv convert \1 -o FILE.safetensors",
}
"""Calls that messages propose, and the commands for them."""


@dataclass(frozen=True)
class Flag:
    """How a command spells one argument.

    on, off: ``--skip-stem`` and ``--no-skip-stem``; ``off`` is empty where no such flag exists.
    takes_value: false for a switch. positional: typed without a flag. setting: the name to assign behind ``--set``.
    """

    on: str
    off: str = ""
    takes_value: bool = True
    positional: bool = False
    setting: str = ""


class TranslatingCommand(TyperCommand):
    """A command that raises the errors of the library in its own flags."""

    def invoke(self, ctx: Any) -> Any:  # a Context of click, or of the copy of click inside typer
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            parts = (to_flags(part, self) for part in (error.given, error.allowed, error.fix))
            raise type(error)(*parts) from error


def to_flags(text: str, command: Any) -> str:
    """``text`` with each ``name=value`` that is an argument of ``command`` as its flag; all other text as it is.

    The arguments of a call (``convert(model, include=...)``) stay: they are Python.
    """
    for call, instead in CALLS.items():
        text = re.sub(call, instead, text)
    table = flags_of(command)
    result, end, after_flag = "", 0, False
    for match in _CALL_OR_ARGUMENT.finditer(text):
        if match.start() < end:
            continue
        if match["name"] is None:
            stop = _end_of_call(text, match.end())
            replacement = text[match.start() : stop]
        else:
            value, stop = _value_at(text, match.end())
            flag = table.get(match["name"])
            if flag is None or value is _NOT_A_VALUE:
                continue
            replacement = _spell(flag, value)
        between = text[end : match.start()]
        both_flags = after_flag and match["name"] is not None
        result += (" " if both_flags and between == ", " else between) + replacement
        end, after_flag = stop, match["name"] is not None
    return result + text[end:]


def flags_of(command: Any) -> dict[str, Flag]:
    """The flag of each argument: the parameters of the command, and the fields of the recipe by ``section.field``."""
    table: dict[str, Flag] = {}
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            table[str(parameter.name)] = Flag(str(parameter.name).upper(), positional=True)
            continue
        off = parameter.secondary_opts[0] if parameter.secondary_opts else ""
        flag = Flag(parameter.opts[0], off, takes_value=not getattr(parameter, "is_flag", False))
        names = [option[2:].replace("-", "_") for option in parameter.opts if option.startswith("--")]
        table |= dict.fromkeys([str(parameter.name), *names], flag)
    by_spelling = {flag.on: flag for flag in table.values()}
    for name, rule in all_rules(TrainingOptions).items():
        if rule.flag in by_spelling:
            table[name] = by_spelling[rule.flag]
        elif "--set" in by_spelling and "." in name:
            table[name] = Flag("--set", setting=name)
    return table


# After a comma without a space it is a part of an arm's text: "condconv:4,layers.router_lr=2".
_CALL_OR_ARGUMENT = re.compile(r"(?<=\w)\(|(?<![\w./?&=\"',-])(?P<name>[a-z_]\w*(?:\.[a-z_]\w*)?)=(?![=>])")
_WORD = re.compile(r"-?\w(?:[\w:/.#*{}+-]*[\w/#*}])?(?![\w(\[]|[.:/-]\w)")
_NO_VALUE, _NOT_A_VALUE = object(), object()


def _end_of_call(text: str, start: int) -> int:
    """The index after the bracket that closes the one before ``start``; ``start`` when none does."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return start


def _value_at(text: str, start: int) -> tuple[Any, int]:
    """The value that is written at ``start``, and the index after it."""
    first = text[start : start + 1]
    if first in tuple("\"'[("):
        closing = {"[": "]", "(": ")"}.get(first, first)
        for index in range(start + 1, len(text)):
            if text[index] == closing:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # an escape that Python does not know, as in "\d"
                        return ast.literal_eval(text[start : index + 1]), index + 1
                except (SyntaxError, ValueError):
                    continue  # the bracket or quote belongs to the value
        return _NOT_A_VALUE, start
    if match := _WORD.match(text, start):
        word = match[0]
        return {"True": True, "true": True, "False": False, "false": False, "None": None}.get(word, word), match.end()
    if text.startswith("...", start):
        return _NO_VALUE, start + 3
    return (_NO_VALUE if re.match(r"[\s,;:.)\]`]|$", text[start:]) else _NOT_A_VALUE), start


def _spell(flag: Flag, value: Any) -> str:
    if value is _NO_VALUE:
        return f"{flag.on} {flag.setting}=..." if flag.setting else flag.on
    if flag.setting:
        return f"{flag.on} {_quote(f'{flag.setting}={_toml(flag.setting, value)}')}"
    if value is None or value == () or value == [] or (value is False and not flag.off):
        return f"no {flag.on}"
    if isinstance(value, bool):
        return (flag.on if value else flag.off) if not flag.takes_value else f"{flag.on} {str(value).lower()}"
    values = [_quote(str(one)) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return " ".join(one if flag.positional else f"{flag.on} {one}" for one in values)


def _toml(name: str, value: Any) -> str:
    """``value`` such that ``--set name=...`` reads it back."""
    if isinstance(value, str) and (_is_number(value) or parse_setting(f"{name}={value}")[2] == value):
        return value
    return json.dumps(value)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _quote(text: str) -> str:
    """``text`` as one word of a shell."""
    if re.fullmatch(r"[\w@%+=:,./#-]+", text):
        return text
    return f'"{text}"' if text and not re.search(r'["$`\\!]', text) else shlex.quote(text)
