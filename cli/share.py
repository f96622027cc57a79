"""``condconv share``: a folder or a repository of the Hugging Face Hub, or a delta file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from condconv_surgery.errors import InputError

from .console import print_json, say
from .convert import writable

if TYPE_CHECKING:
    from torch import nn


def share(
    model: Annotated[str, typer.Argument(help="What convert, finetune or import wrote.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A folder; or, with --base, one file (.safetensors).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Store only what this model has not: the one converted, a name or a file."),
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="With --base: differences of weights in bfloat16, half as large.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Also upload the folder to this repository of the Hub, OWNER/NAME.")
    ] = None,
    license: Annotated[str, typer.Option(help="License of the original weights, for the card.")] = "",
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write a model for others: a folder with a model card for the Hugging Face Hub, or a delta file."""
    precision: Literal["exact", "bfloat16"] = "bfloat16" if bf16 else "exact"
    path = _output(output, base, bf16, push)
    from condconv_surgery.models.delta_base import load, save
    from condconv_surgery.models.hub_source import WEIGHTS
    from condconv_surgery.reporting import recorded_accuracy
    from condconv_surgery.sharing import save_pretrained, upload

    trusted = tuple(trust or ())
    say(f"Loading {model} ...")
    loaded = load(model, trust=trusted)
    recorded = recorded_accuracy(model)
    if path.suffix == ".safetensors":
        save(loaded, path, base=base, precision=precision)
        file = path
    else:
        scores = {} if recorded is None else {f"top-1 on {recorded.where}": recorded.top1}
        card = {"name": push or "", "license": license}
        file = save_pretrained(loaded, path, scores=scores, base=base, precision=precision, **card) / WEIGHTS
    address = upload(path, push) if push else None
    summary = _summary(loaded, file, path, base, trusted)
    if as_json:
        print_json({**summary, "address": address})
        return
    _say_summary(summary, address)


def _output(output: Path | None, base: str | None, bf16: bool, push: str | None) -> Path:
    """The folder or file to write, checked before any work is done."""
    if output is None:
        raise InputError("No output was named.", "-o names a folder.", "-o shared")
    if bf16 and base is None:
        raise InputError(
            "--bf16 without --base.",
            "It rounds differences from the model that was converted; a whole file stays as it is.",
            "--base torchvision:NAME",
        )
    if output.suffix != ".safetensors":
        if output.is_file():
            raise InputError(f"-o {output} is a file.", "It names a folder, or a file (.safetensors).", "-o shared")
        return output
    if base is None or push:
        raise InputError(
            f"-o {output} is one file{f', with --push {push}' if push else ', without --base'}.",
            "One file holds the differences from --base; a whole model is shared as a folder.",
            f"-o {output.with_suffix('')}",
        )
    return writable(output)


def _summary(model: nn.Module, file: Path, path: Path, base: str | None, trust: tuple[str, ...]) -> dict[str, Any]:
    """Sizes, and how far the outputs of what was written are from the model's."""
    from condconv_surgery.models.artifact.container import read_delta
    from condconv_surgery.models.delta_base import load
    from condconv_surgery.runtime.modes import example_arguments
    from condconv_surgery.surgery.proof.compare_outputs import compare, run_both_modes

    arguments, record = example_arguments(model), read_delta(file)
    again = load(file, base=base, trust=trust)
    gap = compare(*(run_both_modes(one, arguments, (False,)) for one in (model, again))).eval
    return {
        "output": f"{path}",
        "bytes": file.stat().st_size,
        "bytes_of_model": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "base": record.base if record else None,
        "weight_error": record.error if record else 0.0,
        "difference": {"absolute": gap.absolute, "relative": gap.relative} if gap else None,
    }


def _say_summary(summary: dict[str, Any], address: str | None) -> None:
    size, whole = summary["bytes"] / 1e6, summary["bytes_of_model"] / 1e6
    if summary["base"]:
        say(f"Base        {summary['base']}, needed to load it")
        say(f"Weights     off by at most {summary['weight_error']:.2g}")
    if gap := summary["difference"]:
        say(f"Difference  {gap['absolute']:.2g} at most between the outputs ({gap['relative']:.1g} of the largest)")
    say(f"Size        {size:.2f} MB; the model's tensors have {whole:.2f} MB")
    say(f"Wrote       {summary['output']}")
    if address:
        say(f"Uploaded    {address}")
