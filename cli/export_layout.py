"""``condconv export``: from an artifact to the checkpoint of another implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, say
from .convert import writable


def export(
    artifact: Annotated[Path, typer.Argument(help="What condconv convert, import or finetune wrote.")],
    layout: Annotated[str, typer.Option(help="timm: its EfficientNets with CondConv; odconv: the authors' code.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to write (.safetensors).")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write the weights under the names and in the shapes of another implementation, exactly."""
    path = writable(output)
    from condconv_surgery.models.artifact.save_load import load
    from condconv_surgery.models.layouts.layout_registry import write_layout

    state = write_layout(load(artifact, trust=tuple(trust or ())), layout, path)
    if as_json:
        print_json({"output": f"{path}", "layout": layout, "tensors": len(state)})
        return
    say(f"Wrote       {path}: {len(state)} tensors as {layout} names them")
    if layout == "odconv":  # the authors' own loading knows torch.save only
        say(f'Read        model.load_state_dict(safetensors.torch.load_file("{path}"))')
