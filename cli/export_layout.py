"""``condconv export``: from an artifact to the file of a runtime, or the checkpoint of another implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from condconv_surgery.errors import InputError, unknown_name

from .model_to_run import own_split
from .output.console import print_json, say
from .output.output_path import writable

TARGETS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "litert": ".tflite", "ncnn": ".param"}
"""The suffix of each runtime's file."""


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
        str | None,
        typer.Option(
            help="Of conditional layers with --to: auto (default), scale, sum, taps, matmul, loop, kernel, grouped."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="With --to: the only batch. Default: any; 1 for litert and ncnn.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="With --to: height and width may change too.")
    ] = False,
    size: Annotated[
        int | None, typer.Option("--input-size", help="Side of the image in pixels, if not the model's own.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8, with --to onnx and --data: convolutions in int8; routers stay float.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images, or the folder of a run: ranges of int8 (training), top-1 of model and file."),
    ] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write the model for a runtime (--to), or its weights in the layout of another implementation (--layout)."""
    if (to is None) == (layout is None):
        raise InputError(
            "Either --to or --layout says what to write.", "--to is for a runtime.", "--to onnx, or --layout timm"
        )
    if layout is not None:
        if dynamic_size or any(value is not None for value in (form, batch, size, quantize, data)):
            raise InputError(
                "--form, --batch, --input-size, --dynamic-size, --quantize and --data go with --to.",
                "A layout has no graph.",
                "--to onnx",
            )
        _export_layout(artifact, layout, writable(output), tuple(trust or ()), as_json)
        return
    if to not in TARGETS:
        raise unknown_name("runtime", to or "", TARGETS, "--to onnx")
    if size is not None and size < 1:
        raise InputError(f"--input-size is {size}.", "It must be at least 1 pixel.", "--input-size 224")
    options = {"to": to, "form": form or "auto", "batch": batch, "dynamic_size": dynamic_size, "size": size}
    options |= {"quantize": quantize, "data": None if data is None else own_split(data, str(artifact))}
    _export_file(artifact, writable(output, TARGETS[to]), options, tuple(trust or ()), as_json)


def _export_file(artifact: Path, path: Path, options: dict[str, Any], trust: tuple[str, ...], as_json: bool) -> None:
    from condconv_surgery.deploy import export as export_model
    from condconv_surgery.models.delta_base import load

    say(f"Exporting {artifact}, then running the file in its runtime ...")
    result = export_model(load(artifact, trust=trust), path, **options)
    shapes = [list(shape) for shape in result.shapes]
    if as_json:
        print_json(
            {
                "output": f"{path}",
                "runtime": result.runtime,
                **result.versions,
                "forms": result.forms,
                "difference": result.difference,
                "rounding": result.rounding,
                "compared": shapes,
                "top1": None
                if result.accuracy is None
                else dict(zip(("model", "file", "images"), (*result.accuracy, result.scored_on), strict=True)),
            }
        )
        return
    counts = ", ".join(f"{count} as {name}" for name, count in result.form_counts().items())
    versions = "".join(f", {name} {number}" for name, number in result.versions.items())
    say(f"Layers      {counts or 'none is conditional'}")
    say(f"Difference  {result.difference:.2g} of the outputs at most, at inputs {', '.join(map(str, shapes))}")
    if result.rounding is not None:
        say(f"Rounding    is the cause: the model itself is {result.rounding:.2g} from its outputs in float64")
    if result.accuracy is not None:
        say("Top-1       {:.2%} of the model, {:.2%} of the file, on ".format(*result.accuracy) + result.scored_on)
    say(f"Wrote       {path}: {path.stat().st_size / 1e6:.1f} MB{versions}")


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
