"""``condconv finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condconv_surgery.errors import InputError

from .console import print_json, say

if TYPE_CHECKING:
    from condconv_surgery.recipe import TrainingOptions
    from condconv_surgery.training import TrainingResult


def finetune(
    model: Annotated[
        str, typer.Argument(help="A converted or plain model: a file, torchvision:NAME, timm:NAME, pkg.module:factory.")
    ] = "",
    data: Annotated[
        str | None, typer.Option(help="Pictures: a folder, x-{00..99}.tar, torchvision:NAME, hf:NAME.")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="The folder that the run writes.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures per step, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of weights; norms, biases, routers have none.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which the rate rises.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Share of the target over all classes.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="First temperature, 30 as for ODConv; 1 after a tenth of the steps.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels; else the model's own.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read pictures.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of split, order, transforms and a new head.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (autocast).")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between saved states.")] = None,
    max_bad: Annotated[int | None, typer.Option(help="Unreadable pictures to pass over.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Any of torch.optim by name: adamw, sgd, ...")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts that a process splits its share of a batch into.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of averaged weights, which are then scored and saved.")
    ] = None,
    warm_routers: Annotated[int | None, typer.Option(help="First epochs in which only routers learn.")] = None,
    freeze: Annotated[list[str] | None, typer.Option(help="Layers that do not learn: a glob. Repeatable.")] = None,
    batch_norm: Annotated[str | None, typer.Option(help="Statistics: train, freeze or recalibrate.")] = None,
    distill: Annotated[str | None, typer.Option(help="Teacher: start (the model as it begins) or any model.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of a bare state_dict: torchvision:NAME.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of a model by name: default, none or a file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any option of the recipe: SECTION.NAME=VALUE. Repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with options; flags win.")] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the effective options and exit.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in the run's folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train a converted (or plain) model on a folder of pictures."""
    flags: dict[str, dict[str, Any]] = {
        "": {
            "model": model or None,
            "arch": arch,
            "weights": weights,
            "trust": trust or None,
            "output": output,
            "seed": seed,
        },
        "data": {
            "folder": data,
            "batch_size": batch_size,
            "image_size": image_size,
            "workers": workers,
            "max_bad": max_bad,
        },
        "optimizer": {
            "name": optimizer,
            "lr": lr,
            "weight_decay": weight_decay,
            "label_smoothing": label_smoothing,
            "accumulate": accumulate,
        },
        "schedule": {"epochs": epochs, "warmup": warmup, "temperature": temperature},
        "layers": {"warm_routers": warm_routers, "freeze": freeze or None, "batch_norm": batch_norm},
        "distill": {"teacher": distill},
        "engine": {"precision": precision, "save_every": save_every, "ema": ema},
    }
    options = effective_options(flags, settings or [], recipe, resume)
    if print_recipe:
        from condconv_surgery.recipe.toml_text import to_toml

        print(to_toml(options), end="")
        return
    require_complete(options)
    result = _train(options, resume)
    if result is None:
        return
    if as_json:
        print_json(result.to_dict())
    _say_result(result)
    if result.stopped_by == 2:
        raise typer.Exit(130)


def effective_options(
    flags: dict[str, dict[str, Any]], settings: list[str], recipe: Path | None, resume: bool
) -> TrainingOptions:
    """Defaults, then the recipe file (on a resume without one: the run's own), then flags, then ``--set``."""
    from condconv_surgery.recipe import TrainingOptions
    from condconv_surgery.recipe.toml_text import from_toml, parse_setting

    output = flags[""]["output"]
    own = Path(output) / "recipe.toml" if output else None
    if recipe is not None:
        options = from_toml(_read(recipe, "--recipe FILE.toml"), str(recipe))
    elif resume and own is not None and (own.is_file() or not flags[""]["model"]):
        options = from_toml(_read(own, f"condconv finetune MODEL --data FOLDER -o {output}, a new run"), str(own))
    else:
        options = TrainingOptions()
    changes: dict[str, Any] = {}
    for section, values in flags.items():
        for name, value in values.items():
            if value is not None:
                _place(changes, section, name, value)
    for setting in settings:
        _place(changes, *parse_setting(setting))
    return options.updated(changes)


def require_complete(options: TrainingOptions) -> None:
    """Raise ``InputError`` when the model, the pictures or the folder to write is not named."""
    for value, what, fix in (
        (options.model, "No model is given.", "condconv finetune MODEL --data FOLDER -o RUN"),
        (options.data.folder, "No pictures are given.", "--data FOLDER"),
        (options.output, "No folder to write is given.", "-o RUN"),
    ):
        if not value:
            raise InputError(what, "finetune needs a model, a folder of pictures and a folder to write.", fix)


def _train(options: TrainingOptions, resume: bool) -> TrainingResult | None:
    """The run; ``None`` in every process but the first."""
    import os

    from condconv_surgery.data.find_data import require_data

    require_data(options.data)  # before the model: a wrong path answers at once

    import torch

    from condconv_surgery.models.sources import load_model
    from condconv_surgery.training import finetune as train
    from condconv_surgery.training.monitor.progress_display import console_watcher

    say(f"Loading {options.model}")
    torch.manual_seed(options.seed)  # of weights that start at random
    loaded = load_model(options.model, arch=options.arch, weights=options.weights, trust=options.trust)
    loaded.float()  # a file may hold half of it: steps are too small for that
    result = train(loaded, options, resume=resume, watcher=console_watcher())
    return result if os.environ.get("RANK", "0") == "0" else None


def _place(changes: dict[str, Any], section: str, name: str, value: Any) -> None:
    (changes.setdefault(section, {}) if section else changes)[name] = value


def _read(path: Path, fix: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            "It must be a recipe that finetune or --print-recipe wrote.",
            fix,
        ) from error


def _say_result(result: TrainingResult) -> None:
    if result.best_top1 is not None:
        say(f"Best top-1 {result.best_top1:.4f} in epoch {result.best_epoch}: {result.output}/best.safetensors")
