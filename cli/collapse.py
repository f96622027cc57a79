"""``condconv collapse``: from an artifact back to a plain network, with one kernel for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condconv_surgery.errors import InputError

from .model_to_run import own_split
from .output.console import print_json, say, say_by_reason
from .output.output_path import writable

if TYPE_CHECKING:
    from condconv_surgery.deploy import Collapse


def collapse(
    artifact: Annotated[Path, typer.Argument(help="What condconv convert, import or finetune wrote.")],
    data: Annotated[
        str | None,
        typer.Option(help="Folder of images, or of a run: mixtures are averaged over the training images."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to write (.safetensors).")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="What stays conditional: a number of routers, or layer names (glob, re:REGEX); repeatable."),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of top-1 that may be lost; routers stay as needed.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Most images for top-1, equally many of each class.")] = 1000,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Replace each conditional layer by a plain one with the kernel of its mean mixture; keep those that earn it."""
    if data is None:
        raise InputError("No images were named.", "--data is a folder of images.", "--data FOLDER")
    if limit < 1:
        raise InputError(f"--limit is {limit}.", "It must be at least 1.", "--limit 1000")
    path = None if dry_run else writable(output)
    from condconv_surgery.deploy import collapse as collapse_model
    from condconv_surgery.models.delta_base import load, save

    say(f"Loading {artifact} ...")
    model = load(artifact, trust=tuple(trust or ()))
    say("Averaging mixtures and measuring accuracy ...")
    result = collapse_model(
        model,
        own_split(data, str(artifact)),
        keep=_keep(keep or []),
        max_drop=max_drop,
        limit=limit,
        inplace=True,
        dry_run=dry_run,
    )
    if path is not None and result.model is not None:
        save(result.model, path)
    if as_json:
        print_json(_summary(result, path))
    else:
        _say_result(result, path)


def _keep(values: list[str]) -> int | tuple[str, ...]:
    if len(values) == 1 and values[0].lstrip("-").isdigit():
        return int(values[0])
    return tuple(values)


def _summary(result: Collapse, path: Path | None) -> dict[str, Any]:
    return {
        "output": None if path is None else f"{path}",
        "collapsed": sum(not layer.kept for layer in result.layers),
        "kept": sum(bool(layer.kept) for layer in result.layers),
        "top1": {"before": result.before, "after": result.after, "images": result.scored_on},
        "layers": [
            {"name": layer.name, "router": layer.router, "variation": layer.variation, "kept": layer.kept or None}
            for layer in result.layers
        ],
    }


def _say_result(result: Collapse, path: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if path is None:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("layer", "variation", "plan"):
            table.add_column(column, overflow="fold")
        for layer in result.layers:
            table.add_row(layer.name, f"{layer.variation:.3f}", f"keep: {layer.kept}" if layer.kept else "collapse")
        Console().print(table)
    kept = [layer.name for layer in result.layers if layer.kept]
    say(f"Collapsed   {len(result.layers) - len(kept)} of {len(result.layers)} conditional layers")
    say_by_reason("Kept", ((layer.name, layer.kept) for layer in result.layers if layer.kept))
    if result.before is None or result.after is None:
        say("Top-1       unknown: the folder's classes are not those of the model")
    else:
        say(f"Top-1       {result.before:.2%} -> {result.after:.2%}, on {result.scored_on}")
    if path is None:
        say("Nothing was written (--dry-run).")
        return
    say(f"Wrote       {path}")
    if not kept:
        say(f'Read        model.load_state_dict(safetensors.torch.load_file("{path}")), model of the original class')
