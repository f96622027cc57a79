"""``condconv fold``: from an artifact to its inference form, without the batch norms behind conditional layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output.console import print_json, say, say_by_reason
from .output.output_path import writable


def fold(
    artifact: Annotated[Path, typer.Argument(help="What condconv convert, import or finetune wrote.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The artifact to write (.safetensors).")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference in eval mode. Default: 1e-4 of the outputs.")
    ] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Fold the batch norm behind each conditional layer into its experts, exactly, for inference."""
    path = writable(output)
    from condconv_surgery.deploy import fold as fold_model
    from condconv_surgery.models.delta_base import load, save

    folding = fold_model(load(artifact, trust=tuple(trust or ())), tolerance=tolerance)
    save(folding.model, path)
    exact = folding.difference_float64
    assert folding.difference is not None
    if as_json:
        skipped = [{"name": skip.name, "reason": skip.reason} for skip in folding.skipped]
        difference = {"eval": folding.difference.absolute}
        if exact is not None:
            difference["eval_float64"] = exact.absolute
        print_json({"output": f"{path}", "folded": len(folding.folded), "skipped": skipped, "difference": difference})
        return
    say(f"Folded      {len(folding.folded)} of {len(folding.folded) + len(folding.skipped)} conditional layers")
    say_by_reason("Skipped", ((skip.name, skip.reason) for skip in folding.skipped))
    say(f"Difference  eval: {folding.difference.absolute:.2g} at most between original and folded")
    if exact is not None:
        say(f"            eval in float64: {exact.absolute:.2g}; the model amplifies the rounding of float32")
    say(f"Wrote       {path}")
