"""``condconv compare``: does conversion pay? Arms trained alike, their difference with an interval, a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condconv_surgery.errors import InputError, counted
from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.recipe.study_arms import DEFAULT_ARMS, parse_arms
from condconv_surgery.recipe.study_options import BUDGETS, StudyOptions

from .finetune import callback_in_flags, effective_options
from .output.console import is_first, print_json, say
from .rule_options import flags_that_are_set, is_typed, with_rule_options

if TYPE_CHECKING:
    from condconv_surgery.studies import QuickCheck

ARMS = " ".join(f"--arm {arm}" for arm in DEFAULT_ARMS)


@with_rule_options
def compare(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="An unconverted model: a file, torchvision:NAME, timm:NAME, pkg.module:factory.")
    ] = "",
    *,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            help="static, or VARIANT:EXPERTS, with options: condconv:4,include=layer4.*,layers.router_lr=2. "
            f"Repeatable. Default: {ARMS}.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Scored runs of each arm.")] = 3,
    budget: Annotated[
        str, typer.Option(help=f"What is equal for all arms: {' or '.join(BUDGETS)} (measured before the study).")
    ] = "steps",
    rates: Annotated[int, typer.Option(help="Learning rates tried for each arm, around --lr. 1: no search.")] = 3,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Two runs of the static network only: can conversion pay at all?"),
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any option of the recipe: SECTION.NAME=VALUE. Repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with options; flags override it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Train a network unconverted and converted, alike, and say whether conversion pays. The same command continues a
    study that was interrupted."""
    study = StudyOptions(parse_arms(arms or DEFAULT_ARMS), seeds, budget, rates)
    typed = flags_that_are_set(flags, ctx)
    options = effective_options(model, typed, settings or [], recipe, flags["output"], False)
    _require_complete(options)
    say(f"Loading {options.model}")
    if quick:
        _say_unused(ctx)
        _quick(options, ctx, as_json)
    else:
        _study(study, options, ctx, as_json)


def _require_complete(options: TrainingOptions) -> None:
    command = "condconv compare MODEL --data FOLDER -o STUDY"
    for value, what in (
        (options.model, "No model is given."),
        (options.data.folder, "No images are given."),
        (options.output, "No output folder is given."),
    ):
        if not value:
            raise InputError(what, "compare needs a model, a folder of images and a folder to write.", command)


def _study(study: StudyOptions, options: TrainingOptions, ctx: typer.Context, as_json: bool) -> None:
    from condconv_surgery.studies import compare as run
    from condconv_surgery.training.monitor.progress_display import BestEpoch

    report = run(
        options.model,
        study.arms,
        options,
        seeds=study.seeds,
        budget=study.budget,
        rates=study.rates,
        display=lambda: BestEpoch(callback_in_flags(ctx)),
    )
    if not is_first():
        return
    if not report.complete:
        raise typer.Exit(128 + report.stopped_by)
    if as_json:
        print_json(report.to_dict())
    else:
        report.print()
    say(f"Wrote {options.output}/study.json, study.md, study.png and study.html")


def _say_unused(ctx: typer.Context) -> None:
    """Name the options of a study that a quick check has no use for."""
    flags = {"arms": "--arm", "seeds": "--seeds", "budget": "--budget", "rates": "--rates"}
    given = [flag for name, flag in flags.items() if is_typed(name, ctx)]
    if given:
        say(f"--quick trains the static network only, twice with one seed: no effect of {', '.join(given)}.")


def _quick(options: TrainingOptions, ctx: typer.Context, as_json: bool) -> None:
    from condconv_surgery.studies import quick_check

    found = quick_check(options.model, options, display=lambda: callback_in_flags(ctx))
    if not is_first():
        return
    if isinstance(found, int):
        raise typer.Exit(128 + found)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_quick(found)


def _print_quick(found: QuickCheck) -> None:
    from condconv_surgery.reporting.render.terminal import make_console, simple_table

    headers = [("static network", False), ("train top-1, %", True), ("validation top-1, %", True)]
    rows = [
        [counted(epochs, "epoch"), f"{100 * train:.1f}", f"{100 * val:.1f}"]
        for epochs, train, val in zip(found.epochs, found.train_top1, found.val_top1, strict=True)
    ]
    console = make_console()
    console.print(simple_table(headers, rows))
    console.print(f"\n[bold]{found.verdict}[/bold]")
