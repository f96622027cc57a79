"""``condconv share``: a folder or a repository of the Hugging Face Hub, or a delta file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condconv_surgery.errors import InputError

from .output.console import print_json, say
from .output.output_path import writable

if TYPE_CHECKING:
    from torch import nn

    from condconv_surgery.models.delta_base import Precision


def share(
    model: Annotated[str, typer.Argument(help="What convert, finetune or import wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A folder; or, with --base, --bf16 or --int8, one file (.safetensors)."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Store only what this model has not: the one converted, a name or a file."),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Experts, or with --base differences of weights, in bfloat16: half as large."),
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Experts in int8, with a scale for each filter: a quarter as large.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Also upload the folder to this repository of the Hub, OWNER/NAME.")
    ] = None,
    license: Annotated[str, typer.Option(help="License of the original weights, for the card.")] = "",
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write a model for others: a folder with a model card for the Hugging Face Hub, or one small file."""
    precision = _precision(base, bf16, int8)
    path = _output(output, base, precision, push)
    from condconv_surgery.models.delta_base import load, save
    from condconv_surgery.models.hub_source import WEIGHTS
    from condconv_surgery.reporting import recorded_accuracy
    from condconv_surgery.sharing import save_pretrained, upload

    trusted = tuple(trust or ())
    say(f"Loading {model} ...")
    loaded = load(model, trust=trusted)
    recorded = recorded_accuracy(model)
    if path.suffix == ".safetensors":
        save(loaded, path, base=base, precision=precision, trust=trusted)
        file = path
    else:
        scores = {} if recorded is None else {f"top-1 on {recorded.where}": recorded.top1}
        folder = save_pretrained(
            loaded,
            path,
            name=push or "",
            license=license,
            scores=scores,
            base=base,
            precision=precision,
            trust=trusted,
        )
        file = folder / WEIGHTS
    address = upload(path, push) if push else None
    summary = _summary(loaded, file, path, base, trusted)
    if as_json:
        print_json({**summary, "address": address})
        return
    _say_summary(summary, address)


def _precision(base: str | None, bf16: bool, int8: bool) -> Precision:
    if int8 and (bf16 or base is not None):
        raise InputError(
            f"--int8 with {'--bf16' if bf16 else '--base'}.",
            "It rounds the experts of a whole model; --bf16 rounds them less, or differences from --base.",
            "leave --int8 out",
        )
    return "int8" if int8 else "bfloat16" if bf16 else "exact"


def _output(output: Path | None, base: str | None, precision: Precision, push: str | None) -> Path:
    """The folder or file to write, checked before any work is done."""
    if output is None:
        raise InputError("No output was named.", "-o names a folder.", "-o shared")
    if output.suffix != ".safetensors":
        if output.is_file():
            raise InputError(f"-o {output} is a file.", "It names a folder, or a file (.safetensors).", "-o shared")
        return output
    if push or (base is None and precision == "exact"):
        raise InputError(
            f"-o {output} is one file{f', with --push {push}' if push else ', without --base, --bf16 or --int8'}.",
            "One file is for a model that takes less space than it has; the Hub gets a folder.",
            f"-o {output.with_suffix('')}",
        )
    return writable(output)


def _summary(model: nn.Module, file: Path, path: Path, base: str | None, trust: tuple[str, ...]) -> dict[str, Any]:
    """Sizes, and how far the outputs of what was written are from the model's."""
    from condconv_surgery.models.artifact.container import read_delta, read_rounded
    from condconv_surgery.models.delta_base import load
    from condconv_surgery.runtime.modes import example_arguments
    from condconv_surgery.surgery.proof.compare_outputs import compare, run_both_modes

    arguments, delta, rounded = example_arguments(model), read_delta(file), read_rounded(file)
    record = delta or rounded
    again = load(file, base=base, trust=trust)
    gap = compare(*(run_both_modes(one, arguments, (False,)) for one in (model, again))).eval
    return {
        "output": f"{path}",
        "bytes": file.stat().st_size,
        "bytes_of_model": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "base": delta.base if delta else None,
        "experts": rounded.precision if rounded else None,
        "weight_error": record.error if record else 0.0,
        "difference": {"absolute": gap.absolute, "relative": gap.relative} if gap else None,
    }


def _say_summary(summary: dict[str, Any], address: str | None) -> None:
    size, whole = summary["bytes"] / 1e6, summary["bytes_of_model"] / 1e6
    if summary["base"]:
        say(f"Base        {summary['base']}, needed to load it")
    if summary["experts"]:
        say(f"Experts     in {summary['experts']}; floats again when loaded")
    if summary["base"] or summary["experts"]:
        say(f"Weights     off by at most {summary['weight_error']:.2g}")
    if gap := summary["difference"]:
        say(f"Difference  {gap['absolute']:.2g} at most between the outputs ({gap['relative']:.1g} of the largest)")
    say(f"Size        {size:.2f} MB; the model's tensors have {whole:.2f} MB")
    say(f"Wrote       {summary['output']}")
    if address:
        say(f"Uploaded    {address}")
