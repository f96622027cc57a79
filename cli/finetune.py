"""``condconv finetune``: from a model and a folder of images to a trained model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.recipe.toml_text import RECIPE, parse_setting, read_recipe_file, to_toml

from .output.console import is_first, print_json, say
from .rule_options import flags_that_are_set, with_rule_options
from .translate_arguments import to_flags

if TYPE_CHECKING:
    from condconv_surgery.training import TrainingResult
    from condconv_surgery.training.monitor.callback import Callback


@with_rule_options
def finetune(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A converted or plain model: a file, torchvision:NAME, timm:NAME, pkg.module:factory.")
    ] = "",
    *,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any option of the recipe: SECTION.NAME=VALUE. Repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with options; flags override it.")] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the effective options and exit.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the state in the run's folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Train a converted (or plain) model on a folder of images. --print-recipe prints all options."""
    typed = flags_that_are_set(flags, ctx)
    options = effective_options(model, typed, settings or [], recipe, flags["output"], resume)
    if print_recipe:
        print(to_toml(options), end="")
        return
    options.require_complete()
    result = _train(options, resume, ctx)
    if is_first():
        _say_result(result, as_json)
    if result.stopped_by:
        raise typer.Exit(128 + result.stopped_by)


def _say_result(result: TrainingResult, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
    if result.stopped_by:
        say(f"Resume: condconv finetune -o {shlex.quote(result.output)} --resume")


def effective_options(
    model: str,
    typed: list[tuple[str, str, Any]],
    settings: list[str],
    recipe: Path | None,
    output: str | None,
    resume: bool,
) -> TrainingOptions:
    """Defaults, then the recipe file (on a resume without one: the run's own), then flags, then ``--set``."""
    own = Path(output) / RECIPE if output else None
    if recipe is not None:
        options = read_recipe_file(recipe)
    elif resume and own is None and not model:
        raise InputError("A resume without a folder.", "It continues the run in a folder.", 'output="RUN"')
    elif resume and own is not None and (own.is_file() or not model):
        options = _own_options(own, bool(model))
    else:
        options = TrainingOptions()
    changes: dict[str, Any] = {"model": model} if model else {}
    for section, name, value in [*typed, *map(parse_setting, settings)]:
        (changes.setdefault(section, {}) if section else changes)[name] = value
    return options.updated(changes)


def _train(options: TrainingOptions, resume: bool, ctx: typer.Context) -> TrainingResult:
    from condconv_surgery.training import finetune as train

    say(f"Loading {options.model}")
    return train(options.model, options, resume=resume, callback=callback_in_flags(ctx, options.trust))


def callback_in_flags(ctx: typer.Context, trust: tuple[str, ...] = ()) -> Callback:
    """The display of progress, whose notes speak of flags. trust: of the command that it proposes next."""
    from condconv_surgery.training.monitor.progress_display import console_display

    return cast("Callback", _InFlags(console_display(), ctx, trust))


class _InFlags:
    """A callback whose notes speak of flags."""

    def __init__(self, callback: Callback, ctx: typer.Context, trust: tuple[str, ...]) -> None:
        self.callback, self.command, self.trust = callback, ctx.command, trust

    def note(self, line: str) -> None:
        self.callback.note(to_flags(line, self.command))

    def end(self, result: TrainingResult, next_call: str) -> None:
        from condconv_surgery.training.monitor.run_summary import best_line

        self.note(best_line(result))
        if next_call:
            from condconv_surgery.data.evaluation_images import data_to_measure
            from condconv_surgery.models.artifact.container import read_recipe
            from condconv_surgery.models.factory_source import packages_to_trust

            packages = packages_to_trust(read_recipe(f"{result.output}/best.safetensors").source, self.trust)
            words = [
                "condconv",
                "report",
                f"{result.output}/best.safetensors",
                "--data",
                data_to_measure(result.output),
            ]
            trusted = [word for package in packages for word in ("--trust", package)]
            self.callback.note(f"Next: {shlex.join([*words, *trusted])}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.callback, name)


def _own_options(recipe: Path, model_is_given: bool) -> TrainingOptions:
    """The options of the run to resume. Where its recipe cannot be read they must be typed again, with the model."""
    call, is_run = f"condconv finetune MODEL --data FOLDER -o {shlex.quote(str(recipe.parent))}", recipe.parent.is_dir()
    fix = f"{call} --resume, with the options of the run" if is_run else call
    try:
        return read_recipe_file(recipe, fix)
    except InputError as error:
        if not model_is_given or error.fix != fix:  # a mistake in a recipe that can be read
            raise
        say(f"{error.given} The options are those typed.")
        return TrainingOptions()
