"""A folder, or a repository of the Hugging Face Hub, that holds a model: its artifact, ``config.json`` and a card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.models.artifact.container import read_recipe
from condconv_surgery.models.artifact.delta import DeltaRecord
from condconv_surgery.models.artifact.rounded_experts import RoundedExperts
from condconv_surgery.models.classifier_logits import is_classifier
from condconv_surgery.models.delta_base import Precision, save
from condconv_surgery.models.hub_source import PREFIX, WEIGHTS, require_hub
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import recipe_of
from condconv_surgery.reporting.measure.profile import profile
from condconv_surgery.runtime.wrappers import unwrapped
from condconv_surgery.sharing.model_card import CardFacts, config, model_card


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "",
    license: str = "",
    scores: Mapping[str, float] | None = None,
    base: str | Path | nn.Module | None = None,
    precision: Precision = "exact",
    trust: str | tuple[str, ...] = (),
) -> Path:
    """Write ``model.safetensors``, ``config.json`` and ``README.md`` into ``folder``, and return it.

    The folder is what ``from_pretrained`` and every command read, and what ``push_to_hub`` uploads.

    name: ``OWNER/NAME`` in the card; by default the folder's. license: of the original weights, where the source does
    not say it. scores: for the card, 0 to 1, as ``{"top-1 on my images": 0.91}``. base, precision: see ``save``: the
    file then holds what the base has not, or its experts in fewer bits. trust: packages whose code may build ``base``.

    Raises as ``save``.
    """
    model, folder = unwrapped(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = save(model, folder / WEIGHTS, base=base, precision=precision, trust=trust)
    totals = profile(model)
    recipe = read_recipe(folder / WEIGHTS)
    facts = CardFacts(
        name=name or folder.resolve().name,
        parameters=(totals.parameters_before, totals.parameters),
        macs=(totals.macs_before, totals.macs.total),
        scores=scores or {},
        license=license or _license(model),
        classifier=is_classifier(model),
        base=record.base if isinstance(record, DeltaRecord) else "",
        experts=record.precision if isinstance(record, RoundedExperts) else "",
        error=record.error if record else 0.0,
    )
    (folder / "config.json").write_text(config(recipe, facts), encoding="utf-8")
    (folder / "README.md").write_text(model_card(recipe, facts), encoding="utf-8")
    return folder


def push_to_hub(model: nn.Module, name: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
    """Upload the folder of ``save_pretrained`` to the repository ``name``, made if need be; returns its address.

    options: of ``save_pretrained``. token: of huggingface_hub; by default the one of its login.
    """
    require_hub()
    with tempfile.TemporaryDirectory() as folder:
        return upload(save_pretrained(model, folder, name=name, **options), name, private=private, token=token)


def upload(folder: Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a folder of ``save_pretrained``; see ``push_to_hub``."""
    api = require_hub().HfApi(token=token)
    address = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model and its card")
    return f"{address}"


def from_pretrained(name: str | Path, *, trust: tuple[str, ...] | str = ()) -> nn.Module:
    """The model in a folder of ``save_pretrained``, or in a repository of the Hub, ``OWNER/NAME``, in eval mode.

    Without a network it comes from the Hub's cache. trust: see ``load``.
    """
    local = Path(name).is_dir() or f"{name}".startswith(PREFIX)
    return load_model(f"{name}" if local else f"{PREFIX}{name}", trust=trust)


def _license(model: nn.Module) -> str:
    """That of the weights that a library published; of a file of weights none is known, whatever its architecture."""
    recipe = recipe_of(model)
    if recipe is not None and recipe.source.name:
        return recipe.license
    own = getattr(model, "pretrained_cfg", None)  # of timm's models, made in memory
    return str(own.get("license") or "") if isinstance(own, dict) else ""
