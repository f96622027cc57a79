"""``condconv convert``: from a trained model to a converted one that computes the same function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import STARTS, VARIANTS, Selection, Upcycling, Variant, make_variant

from .console import print_json, say, say_by_reason
from .next_step import next_step
from .translate_arguments import to_flags

if TYPE_CHECKING:
    from torch import nn

    from condconv_surgery.surgery import Conversion, ModelPlan, Plan

AnyPlan = TypeVar("AnyPlan", bound="Plan")
Patterns = Annotated[list[str] | None, typer.Option(help='Layer names, a glob ("layer4.*") or re:REGEX; repeatable.')]


def convert(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="torchvision:NAME, timm:NAME, transformers:FOLDER, hf:OWNER/NAME, condconv:mobilenet_v1, a file or "
            "pkg.mod:factory."
        ),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The artifact to write (.safetensors).")] = None,
    variant: Annotated[str, typer.Option(help=f"Conditional convolution: {', '.join(VARIANTS)}.")] = "condconv",
    experts: Annotated[int, typer.Option(help="Kernels per layer.")] = 4,
    reduction: Annotated[
        int | None, typer.Option(help="Hidden width of the router: channels / REDUCTION (odconv, dynamicconv).")
    ] = None,
    min_hidden: Annotated[
        int | None, typer.Option(help="Smallest hidden width of the router (odconv; default 16).")
    ] = None,
    gates: Annotated[
        str | None, typer.Option(help="Gates of odconv's experts: softmax (default), or sigmoid as in condconv.")
    ] = None,
    spatial: Annotated[
        bool | None,
        typer.Option(
            "--spatial/--no-spatial",
            help="Attention over kernel positions (odconv; default on). Off with --experts 1: exports to any runtime.",
        ),
    ] = None,
    routing: Annotated[
        str, typer.Option(help="layer: a router for each layer; block: one for all layers of a block.")
    ] = "layer",
    blocks: Annotated[
        list[str] | None,
        typer.Option("--block", help="Modules that share a router, a glob or re:REGEX; repeatable. Default: found."),
    ] = None,
    subclasses: Annotated[
        list[str] | None,
        typer.Option(
            "--subclass",
            help="PACKAGE.CLASS that computes what nn.Conv2d computes, which the proof checks; repeatable.",
        ),
    ] = None,
    include: Patterns = None,
    exclude: Patterns = None,
    min_channels: Annotated[int, typer.Option(help="Skip layers with fewer input or output channels.")] = 0,
    skip_stem: Annotated[bool, typer.Option(help="Skip the first convolution, which sees the image.")] = True,
    skip_pooled: Annotated[bool, typer.Option(help="Skip convolutions over 1x1 maps (squeeze-and-excite).")] = True,
    classifier: Annotated[
        bool, typer.Option("--classifier", help="Also convert the last layer, which gives the logits.")
    ] = False,
    diversity: Annotated[
        float | None, typer.Option(help="Noise that separates the experts, in standard deviations of the weight.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of random directions.")] = 0,
    start: Annotated[
        str,
        typer.Option(
            help=f"How experts get their own gradients: {', '.join(STARTS)}; auto is the best of the variant."
        ),
    ] = "auto",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images along which routers start (not for noise): a folder, or what finetune reads.",
        ),
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of a file of weights that is not recognised.")] = None,
    weights: Annotated[str, typer.Option(help="For a name: default (pretrained), none or a file.")] = "default",
    num_classes: Annotated[int | None, typer.Option(help="Classes of the model, if not the library's own.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the square input, in pixels.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest difference in eval mode, 10x in train mode. Default: 1e-4 of the outputs."),
    ] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Replace the convolutions of a trained MODEL by conditional ones; same function at the start."""
    trusted = tuple(trust or ())
    attention = {"reduction": reduction, "min_hidden": min_hidden, "gates": gates, "spatial": spatial}
    layer = make_variant(variant, trust=trusted, experts=experts, routing=routing, **attention)
    patterns, names = (tuple(include or ()), tuple(exclude or ())), (tuple(blocks or ()), tuple(subclasses or ()))
    selection = Selection(*patterns, min_channels, skip_stem, skip_pooled, classifier, *names)
    upcycling = Upcycling(start, diversity=diversity, seed=seed)
    _check_sizes(input_size, tolerance)
    path = None if dry_run else writable(output)
    from condconv_surgery.models.artifact.save_load import save
    from condconv_surgery.models.half_precision import to_dtypes, to_float32
    from condconv_surgery.models.sources import load_model
    from condconv_surgery.surgery.upcycle import start_of

    say(f"Loading {model} ...")
    original = load_model(
        model, arch=arch, weights=weights, num_classes=num_classes, input_size=input_size, trust=trusted
    )
    if dry_run:
        _show_plan(original, selection, layer, ctx, as_json)
        return
    stored = to_float32(original)
    conversion = _convert(original, layer, selection, upcycling, calibration, tolerance, ctx)
    to_dtypes(conversion.model, stored)
    assert path is not None
    used = start_of(layer, upcycling) if layer.experts > 1 else None
    summary = _summary(model, path, layer, conversion, used, calibration is not None)  # an error here leaves no file
    save(conversion.model, path)
    summary["dtype"] = " and ".join(sorted({str(kind).removeprefix("torch.") for kind in stored.values()})) or None
    if as_json:
        print_json(summary)
    else:
        _say_summary(summary, conversion, trusted)


def _check_sizes(input_size: int | None, tolerance: float | None) -> None:
    if input_size is not None and input_size < 1:
        raise InputError(f"--input-size is {input_size}.", "It must be at least 1 pixel.", "--input-size 224")
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"--tolerance is {tolerance}.", "It must be 0 or more.", "--tolerance 1e-4")


def writable(output: Path | None, suffix: str = ".safetensors") -> Path:
    """The output path, checked before any work is done."""
    import os

    if output is None:
        raise InputError("No output was named.", "-o names the file to write.", f"-o model.condconv{suffix}")
    if output.suffix != suffix:
        raise InputError(f"-o {output} does not end in {suffix}.", "It must.", f"-o {output.with_suffix(suffix)}")
    folder = output.parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"-o {output} cannot be written.", f"{folder} must be a folder that exists and is writable.", "another -o"
        )
    return output


def _convert(
    model: nn.Module,
    variant: Variant,
    selection: Selection,
    upcycling: Upcycling,
    calibration: str | None,
    tolerance: float | None,
    ctx: typer.Context,
) -> Conversion:
    from dataclasses import asdict, replace

    from condconv_surgery.data.calibration_images import calibration_images
    from condconv_surgery.runtime.modes import input_spec_of
    from condconv_surgery.surgery import convert as convert_model

    say("Converting, then running both models in eval and in train mode ...")
    options: dict[str, Any] = {**asdict(selection), **asdict(upcycling)}
    if calibration is not None:
        options["calibration"] = calibration_images(calibration, input_spec_of(model))
    conversion = convert_model(model, variant, inplace=True, tolerance=tolerance, **options)
    return replace(conversion, plan=_in_flags(conversion.plan, ctx))


def _in_flags(plan: AnyPlan, ctx: typer.Context) -> AnyPlan:
    """The plan with the arguments in its reasons and notes as flags."""
    from dataclasses import replace

    skipped = tuple(replace(skip, reason=to_flags(skip.reason, ctx.command)) for skip in plan.skipped)
    return replace(plan, skipped=skipped, notes=tuple(to_flags(note, ctx.command) for note in plan.notes))


def _show_plan(model: nn.Module, selection: Selection, variant: Variant, ctx: typer.Context, as_json: bool) -> None:
    from dataclasses import asdict

    from condconv_surgery.surgery import plan as make_plan

    plan = _in_flags(make_plan(model, variant, inplace=True, **asdict(selection)), ctx)
    if as_json:
        print_json(
            {
                "variant": variant.kind,
                "experts": variant.experts,
                "routers": [{"block": router.block, "layers": router.layers} for router in plan.routers],
                "to_convert": [
                    {
                        "name": site.name,
                        "calls": site.calls,
                        "input": site.input,
                        "followed_by": plan.followers.by_layer.get(site.name, ()),
                    }
                    for site in plan.to_convert
                ],
                "skipped": _skipped(plan),
                "notes": [*plan.notes, *plan.followers.notes()],
            }
        )
        return
    _print_plan(plan)
    say(f"Would convert {len(plan.to_convert)} layers and skip {len(plan.skipped)}. Nothing was changed (--dry-run).")


def _print_plan(plan: ModelPlan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    table.add_column("input", no_wrap=True)
    table.add_column("plan", overflow="fold")
    block_of = {name: router.block for router in plan.routers for name in router.layers}
    for site in plan.to_convert:
        shape = "x".join(map(str, site.input[1:])) if site.input else ""
        times = f", called {site.calls} times" if site.calls > 1 else ""
        routed = f", routed by {block_of[site.name]}" if site.name in block_of else ""
        then = f", then {', '.join(plan.followers.by_layer[site.name])}" if site.name in plan.followers.by_layer else ""
        table.add_row(site.name, shape, f"convert{times}{routed}{then}")
    for skip in plan.skipped:
        table.add_row(skip.name, "", f"skip: {skip.reason}")
    Console().print(table)
    for note in (*plan.notes, *plan.followers.notes()):
        say(f"Note: {note}")


def _summary(
    source: str, path: Path, variant: Variant, conversion: Conversion, start: str | None, calibrated: bool
) -> dict[str, Any]:
    from condconv_surgery.recipe import recipe_of
    from condconv_surgery.reporting import profile

    totals = profile(conversion.model)
    recipe, difference = recipe_of(conversion.model), conversion.difference
    assert difference is not None
    return {
        "output": str(path),
        "source": recipe.source.name if recipe and recipe.source.name else source,
        "variant": variant.kind,
        "experts": variant.experts,
        "start": start,
        "calibrated": calibrated,
        "converted": len(conversion.plan.to_convert),
        "routers": len(conversion.plan.to_convert) - sum(len(router.layers) - 1 for router in conversion.plan.routers),
        "skipped": _skipped(conversion.plan),
        "parameters": {"before": totals.parameters_before, "after": totals.parameters},
        "macs": {"before": totals.macs_before, "after": totals.macs.total},
        "difference": {
            "eval": difference.eval and difference.eval.absolute,
            "train": difference.train and difference.train.absolute,
        },
    }


def _skipped(plan: Plan) -> list[dict[str, str]]:
    return [{"name": skip.name, "reason": skip.reason} for skip in plan.skipped]


def _say_summary(summary: dict[str, Any], conversion: Conversion, trust: tuple[str, ...]) -> None:
    def change(name: str, unit: float, suffix: str) -> str:
        before, after = summary[name]["before"], summary[name]["after"]
        return f"{before / unit:.2f}{suffix} -> {after / unit:.2f}{suffix} ({after / before - 1:+.1%})"

    converted, skipped = summary["converted"], summary["skipped"]
    say(f"Source      {summary['source']}")
    how = f"to {summary['variant']}, {summary['experts']} experts each"
    say(f"Converted   {converted} of {converted + len(skipped)} layers {how}")
    if summary["routers"] < converted:
        say(f"Routers     {summary['routers']}, {len(conversion.plan.routers)} of them for a whole block")
    if summary["start"] not in (None, "noise"):
        along = (
            "in which the images differ most" if summary["calibrated"] else "drawn at random (--data finds better ones)"
        )
        say(f"Start       {summary['start']}: equal experts, routers along directions {along}")
    say_by_reason("Skipped", ((row["name"], row["reason"]) for row in skipped))
    for note in conversion.plan.notes:
        say(f"Note        {note}")
    say(f"Parameters  {change('parameters', 1e6, 'M')}")
    say(f"MACs        {change('macs', 1e6, 'M')} per image")
    for mode, gap in summary["difference"].items():
        text = "not compared (see the note)" if gap is None else f"{gap:.2g} at most between original and converted"
        say(f"Difference  {mode}: {text}")
    if summary["dtype"]:
        say(f"Stored      in {summary['dtype']}, as it came; converted and compared in float32")
    say(f"Wrote       {summary['output']}")
    say(f"Next        {next_step(conversion.model, Path(summary['output']), trust)}")
