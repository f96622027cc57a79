"""``hf:OWNER/NAME``: a repository of the Hugging Face Hub, from its cache where there is no network; and its folder.

Only JSON and safetensors files are fetched. A repository that ``push_to_hub`` made holds an artifact; any other is
loaded as its folder would be.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.container import is_artifact
from condconv_surgery.models.source_registry import LoadOptions, ModelSource, source_for

PREFIX = "hf:"
WEIGHTS = "model.safetensors"
"""The artifact's name in a folder."""


def require_hub() -> Any:
    """The huggingface_hub package, or an error that says how to install it."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise InputError(
            "huggingface_hub is not installed.", "hf: models need the extra.", 'pip install "condconv-surgery[hub]"'
        ) from error


def artifact_file(text: str | Path) -> Path:
    """The artifact that ``text`` names: a file, a folder that holds one, or ``hf:OWNER/NAME``."""
    path = _snapshot(f"{text}") if f"{text}".startswith(PREFIX) else Path(text)
    return path / WEIGHTS if is_artifact(path / WEIGHTS) else path


def _load(text: str, options: LoadOptions) -> nn.Module:
    path = f"{artifact_file(text)}"
    return source_for(path).load(path, options)


def _snapshot(text: str) -> Path:
    """The folder in the Hub's cache. Raises ``InputError`` when it can't be fetched and is not there."""
    hub = require_hub()
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # its errors of the network, of a missing repository and of a bad name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{text} could not be fetched, and is not in the cache: {reason}",
            "It is hf:OWNER/NAME, or hf:OWNER/NAME@REVISION, of a repository that you may read.",
            f"hf download {name} where there is a network, or its folder",
        ) from error


HUB = ModelSource("hf", lambda text: text.startswith(PREFIX), _load)
FOLDER = ModelSource("hub folder", lambda text: is_artifact(Path(text) / WEIGHTS), _load)
