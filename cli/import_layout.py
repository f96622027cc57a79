"""``condconv import``: from a checkpoint of another implementation to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condconv_surgery.errors import InputError, counted

from .output.console import print_json, say
from .output.output_path import writable

if TYPE_CHECKING:
    from torch import nn


def import_(
    file: Annotated[
        Path,
        typer.Argument(help="Weights as timm or ODConv's authors write conditional layers; or a delta file."),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The artifact to write (.safetensors).")] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of the weights, where it is not recognised.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the model, with --arch.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the square input, in pixels.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Of a delta file: the model whose differences it holds, a name or a file.")
    ] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Read a conditional network that timm or the authors of ODConv saved, or a delta file; nothing is converted."""
    path = writable(output)
    if not file.is_file():
        raise InputError(f"{file} is not a file.", "It must hold the weights.", "another path")
    from condconv_surgery.layers import conditional_layers
    from condconv_surgery.models.delta_base import load, save
    from condconv_surgery.models.sources import load_model
    from condconv_surgery.recipe import recipe_of

    trusted = tuple(trust or ())
    if base is None:
        model = load_model(f"{file}", arch=arch, num_classes=num_classes, input_size=input_size, trust=trusted)
    else:
        model = load(file, base=base, trust=trusted)
    recipe = recipe_of(model)
    if not conditional_layers(model):
        raise InputError(
            f"{file} has no conditional layer.",
            "Supported are timm's CondConv (routing_fn) and the layers of ODConv's authors.",
            f"condconv convert {file} -o {path}",
        )
    save(model, path)
    summary = _summary(model, path, recipe.source.name if recipe else "")
    if as_json:
        print_json(summary)
        return
    say(f"Source      {summary['source']}")
    say(f"Layers      {summary['layers']} {summary['variant']}, {counted(summary['experts'], 'expert')} each")
    say(f"Routers     {summary['routers']}")
    say(f"Parameters  {summary['parameters'] / 1e6:.2f}M")
    say(f"Wrote       {path}")


def _summary(model: nn.Module, path: Path, source: str) -> dict[str, Any]:
    from condconv_surgery.layers import conditional_layers, routers

    layers = list(conditional_layers(model).values())
    return {
        "output": f"{path}",
        "source": source,
        "variant": layers[0].variant.kind,
        "experts": layers[0].experts,
        "layers": len(layers),
        "routers": len(routers(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
