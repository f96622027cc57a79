"""``condconv report``: what a model consists of, computes and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from condconv_surgery.errors import InputError

from .output import print_json, say

if TYPE_CHECKING:
    from condconv_surgery.reporting import Report


def report(
    model: Annotated[str, typer.Argument(help="A converted or plain model: a file, torchvision:NAME, timm:NAME.")],
    arch: Annotated[str | None, typer.Option(help="Architecture of a bare state_dict: torchvision:NAME.")] = None,
    weights: Annotated[str, typer.Option(help="default, none, or a FILE, for a model by name.")] = "default",
    input_size: Annotated[int | None, typer.Option(help="Side of the picture in pixels; else the model's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line a layer.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Parameters and MACs, layer by layer, before and after conversion."""
    if as_json + as_csv + as_markdown > 1:
        raise InputError("Several of --json, --csv and --markdown.", "stdout has one form.", "one of them")
    found = _measure(model, arch, weights, input_size)
    if as_json:
        print_json(found.to_dict())
    elif as_csv:
        print(found.to_csv(), end="")
    elif as_markdown:
        print(found.to_markdown(), end="")
    else:
        found.print()


def _measure(model: str, arch: str | None, weights: str, input_size: int | None) -> Report:
    from condconv_surgery.models.sources import load_model
    from condconv_surgery.reporting import report as measure

    say(f"Loading {model}")
    return measure(load_model(model, arch=arch, weights=weights, input_size=input_size))
