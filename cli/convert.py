"""``condconv convert``: from a trained model to a converted one that computes the same function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import STARTS, VARIANTS, Selection, Upcycling, Variant, make_variant

from .output.console import print_json, say
from .output.conversion_output import conversion_facts, plan_facts, print_plan, say_conversion
from .output.output_path import writable
from .translate_arguments import to_flags

if TYPE_CHECKING:
    from torch import nn

    from condconv_surgery.surgery import Conversion, Plan

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
    variant: Annotated[
        str | None,
        typer.Option(
            help=f"Conditional convolution: {', '.join(VARIANTS)}. Default: odconv with one expert; condconv with "
            "--experts, --start, --diversity, --data or --routing, but for options of odconv."
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Kernels per layer. Default: 4; 1 where nothing is said about experts.")
    ] = None,
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
            help="Attention over kernel positions (odconv; default on). Off with one expert: exports to any runtime.",
        ),
    ] = None,
    routing: Annotated[
        str, typer.Option(help="layer: a router for each layer; block: one for all layers of a block.")
    ] = Variant.routing,
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
        float | None,
        typer.Option(help="With --start noise: what separates the experts, in standard deviations of the weight."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of random directions.")] = 0,
    start: Annotated[
        str,
        typer.Option(
            help=f"How experts get their own gradients: {', '.join(STARTS)}; auto is the best of the variant."
        ),
    ] = Upcycling.start,
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
    if variant is None:
        for_experts = any(option is not None for option in (diversity, calibration))
        for_experts = for_experts or start != Upcycling.start or routing != Variant.routing
        variant, experts = _default_variant(experts, for_experts, attention)
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
    facts = conversion_facts(model, path, layer, conversion, used, calibration is not None)  # an error leaves no file
    save(conversion.model, path)
    facts["dtype"] = " and ".join(sorted({str(kind).removeprefix("torch.") for kind in stored.values()})) or None
    if as_json:
        print_json(facts)
    else:
        say_conversion(facts, conversion, trusted)


def _default_variant(experts: int | None, for_experts: bool, attention: dict[str, Any]) -> tuple[str, int | None]:
    """The variant, and its number of experts, where none is named: the one that has the options that are given.

    for_experts: there are others than ``experts`` that a single expert has no use for. attention: those of ODConv.
    """
    if any(option is not None for option in attention.values()):
        several = for_experts or attention["gates"] is not None
        return "odconv", experts if experts is not None or several else 1
    return ("condconv", experts) if for_experts or experts is not None else ("odconv", 1)


def _check_sizes(input_size: int | None, tolerance: float | None) -> None:
    if input_size is not None and input_size < 1:
        raise InputError(f"--input-size is {input_size}.", "It must be at least 1 pixel.", "--input-size 224")
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"--tolerance is {tolerance}.", "It must be 0 or more.", "--tolerance 1e-4")


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
        print_json(plan_facts(plan, variant))
    else:
        print_plan(plan)
