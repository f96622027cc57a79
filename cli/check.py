"""``condconv check``: what a run would train and validate on, without a run."""

from __future__ import annotations

from typing import Annotated

import typer

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.recipe.toml_text import parse_setting

from .output.console import print_json
from .translate_arguments import to_flags


def check(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Images, as finetune reads them: a folder, shards, torchvision:NAME, hf:NAME; or a run."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the split, as in finetune.")] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Largest number of images of each part to decode. Default: all.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the data: data.NAME=VALUE. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what is in the data before a run: images, classes, split, sizes, skipped and unreadable files, duplicates."""
    if not data:
        raise InputError("No images are given.", "check needs images.", "condconv check --data FOLDER")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}.", "It must be at least 1.", "--limit 2000")
    changes: dict[str, object] = {"folder": data}
    for section, name, value in map(parse_setting, settings or []):
        if section != "data":
            raise InputError(f"--set {section}.{name}.", "A check has options of the data only.", 'data.val="FOLDER"')
        changes[name] = value
    options = TrainingOptions().updated({"data": changes}).data

    from condconv_surgery.data.data_check import check_data

    found = check_data(options, seed=seed, limit=limit)
    if as_json:
        print_json(found.to_dict())
    else:
        for line in found.lines():
            print(to_flags(line, ctx.command))
