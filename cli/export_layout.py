"""``condconv export``: from an artifact to the file of a runtime, or the checkpoint of another implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from condconv_surgery.errors import InputError, unknown_name

from .console import print_json, say
from .convert import writable

TARGETS = ("onnx",)


def export(
    artifact: Annotated[Path, typer.Argument(help="What condconv convert, import, fold or finetune wrote.")],
    to: Annotated[
        str | None, typer.Option(help=f"The runtime, in which the file is proven: {', '.join(TARGETS)}.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="timm: its EfficientNets with CondConv; odconv: the authors' code.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to write.")] = None,
    form: Annotated[
        str | None, typer.Option(help="Of conditional layers with --to: auto (default), scale, sum, matmul.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="With --to: height and width may change too.")
    ] = False,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write the model for a runtime (--to), or its weights in the layout of another implementation (--layout)."""
    if (to is None) == (layout is None):
        raise InputError(
            "Either --to or --layout says what to write.", "--to is for a runtime.", "--to onnx, or --layout timm"
        )
    if layout is not None:
        if form is not None or dynamic_size:
            raise InputError("--form and --dynamic-size go with --to.", "A layout has no graph.", "--to onnx")
        _export_layout(artifact, layout, writable(output), tuple(trust or ()), as_json)
        return
    if to not in TARGETS:
        raise unknown_name("runtime", to or "", TARGETS, "--to onnx")
    _export_onnx(artifact, writable(output, ".onnx"), form or "auto", dynamic_size, tuple(trust or ()), as_json)


def _export_onnx(
    artifact: Path, path: Path, form: str, dynamic_size: bool, trust: tuple[str, ...], as_json: bool
) -> None:
    from condconv_surgery.deploy import export_onnx
    from condconv_surgery.deploy.onnx_export import form_counts
    from condconv_surgery.models.delta_base import load

    say(f"Exporting {artifact}, then running the file in ONNX Runtime ...")
    result = export_onnx(load(artifact, trust=trust), path, form=form, dynamic_size=dynamic_size)
    shapes = [list(shape) for shape in result.shapes]
    if as_json:
        print_json(
            {
                "output": f"{path}",
                "opset": result.opset,
                "ir": result.ir,
                "forms": result.forms,
                "difference": result.difference,
                "compared": shapes,
            }
        )
        return
    counts = ", ".join(f"{count} as {name}" for name, count in form_counts(result).items())
    say(f"Layers      {counts or 'none is conditional'}")
    say(f"Difference  {result.difference:.2g} of the outputs at most, at inputs {', '.join(map(str, shapes))}")
    say(f"Wrote       {path}: opset {result.opset}, IR {result.ir}, {path.stat().st_size / 1e6:.1f} MB")


def _export_layout(artifact: Path, layout: str, path: Path, trust: tuple[str, ...], as_json: bool) -> None:
    from condconv_surgery.models.delta_base import load
    from condconv_surgery.models.layouts.layout_registry import write_layout

    state = write_layout(load(artifact, trust=trust), layout, path)
    if as_json:
        print_json({"output": f"{path}", "layout": layout, "tensors": len(state)})
        return
    say(f"Wrote       {path}: {len(state)} tensors as {layout} names them")
    if layout == "odconv":  # the authors' own loading knows torch.save only
        say(f'Read        model.load_state_dict(safetensors.torch.load_file("{path}"))')
