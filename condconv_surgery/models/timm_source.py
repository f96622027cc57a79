"""``timm:NAME``: timm's models, with its published weights and the input that it names for them."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.models.source_registry import named_source
from condconv_surgery.recipe import Source


def require_timm() -> Any:
    """The timm package, or an error that says how to install it."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise InputError(
            "timm is not installed.", "timm: models need the extra.", 'pip install "condconv-surgery[timm]"'
        ) from error


def _build(source: Source) -> nn.Module:
    timm, name = require_timm(), source.name.partition(":")[2]
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models(), "timm:resnet18")
    model: nn.Module = timm.create_model(**{**source.options, "model_name": name, "pretrained": False})
    return model


def _pretrained(name: str) -> nn.Module | None:
    if name not in require_timm().list_pretrained():
        return None
    model: nn.Module = require_timm().create_model(name, pretrained=True)
    model.eval()
    return model


def _license(source: Source, model: nn.Module, published: bool) -> str:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("license") or "") if published else ""


TIMM = named_source("timm", _build, pretrained=_pretrained, license=_license)
