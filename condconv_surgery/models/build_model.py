"""From a ``Source`` to a model: torchvision and timm by name, a user's own factory when its package is trusted."""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import Any

import torchvision
from torch import nn

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.layers import conditional_like
from condconv_surgery.layers.conv2d_subclasses import geometry_of
from condconv_surgery.recipe import ConvertedLayer, Source
from condconv_surgery.surgery.upcycle import move_hooks


def build(source: Source, trust: tuple[str, ...] = ()) -> nn.Module:
    """A fresh model with random weights, in eval mode.

    Raises ``InputError`` for a name that the library does not have, options that its factory does not take, or a
    factory outside torchvision and timm whose top-level package is not in ``trust``.
    """
    library, _, name = source.name.partition(":")
    if library == "torchvision":
        return build_torchvision(name, source.options)
    if library == "timm":
        return build_timm(name, source.options)
    return _call_factory(library, name, source.options, trust)


def exchange_heads(model: nn.Module, heads: dict[str, int]) -> None:
    """Give the named final layers other widths, with fresh weights, in place.

    Raises ``AttributeError`` for a name that is not there or not a head.
    """
    for name, width in heads.items():
        model.set_submodule(name, resized(model.get_submodule(name), width))


def put_conditional(skeleton: nn.Module, row: ConvertedLayer) -> None:
    """Exchange a plain layer for an empty conditional one with its hooks, at every name that it has.

    Raises ``AttributeError`` when there is no such layer there.
    """
    plain = skeleton.get_submodule(row.names[0])
    if not isinstance(plain, nn.Linear if row.linear else nn.Conv2d):
        raise AttributeError(f"{row.names[0]} is a {type(plain).__name__}")
    if plain.weight.shape[:2] != geometry_of(plain).weight_shape[:2]:
        raise AttributeError(f"{row.names[0]} is not what its weight is")
    layer = conditional_like(plain, row.variant)
    move_hooks(plain, layer)
    for name in row.names:
        skeleton.set_submodule(name, layer, strict=True)


def build_torchvision(name: str, options: dict[str, Any], weights: Any = None) -> nn.Module:
    """The torchvision model, without any weights unless given: the backbone's are not fetched either."""
    if name not in torchvision.models.list_models():
        raise unknown_name("torchvision model", name, torchvision.models.list_models(), "torchvision:resnet18")
    builder = torchvision.models.get_model_builder(name)
    fixed: dict[str, Any] = {"weights": weights}
    if "weights_backbone" in inspect.signature(builder).parameters:
        fixed["weights_backbone"] = None  # the default downloads
    if name in ("googlenet", "inception_v3") and weights is None:
        fixed["init_weights"] = False  # truncated normals take seconds, and are filled at once
    return _checked(builder, {**options, **fixed}, f"torchvision:{name}")


def build_timm(name: str, options: dict[str, Any]) -> nn.Module:
    """``timm.create_model`` without weights."""
    timm = require_timm()
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models(), "timm:resnet18")
    return _checked(timm.create_model, {**options, "model_name": name, "pretrained": False}, f"timm:{name}")


def require_timm() -> Any:
    """The timm package, or an error that says how to get it."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise InputError(
            "timm is not installed.", "timm: models need the extra.", 'pip install "condconv-surgery[timm]"'
        ) from error


def _call_factory(module: str, name: str, options: dict[str, Any], trust: tuple[str, ...]) -> nn.Module:
    package = module.partition(".")[0]
    if package not in trust:
        raise InputError(
            f"The model is built by {module}:{name}, code of the package {package!r}.",
            "Only torchvision and timm are imported unasked. If you trust that package, say so.",
            f'--trust {package}, or load(path, trust=("{package}",))',
        )
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{module}:{name} cannot be imported: {error}.",
            "A factory is package.module:function, importable from here.",
            "PYTHONPATH=. condconv ...",
        ) from error
    return _checked(factory, options, f"{module}:{name}")


def _checked(factory: Any, options: dict[str, Any], source: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision and timm warn of their own defaults
            model = factory(**options)
    except OSError:  # weights could not be fetched
        raise
    except Exception as error:  # options can come from a file, and each factory fails in its own way
        raise InputError(f"{source} cannot be built with {options}: {error}.", "Its factory says so.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{source} gave a {type(model).__name__}.", "A factory must return an nn.Module.")
    return model.eval()


def resized(head: nn.Module, width: int) -> nn.Linear | nn.Conv2d:
    """A fresh head of another width, otherwise the same. Raises ``AttributeError`` for what is no plain head."""
    bias = getattr(head, "bias", None) is not None
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, width, bias, head.weight.device, head.weight.dtype)
    if isinstance(head, nn.Conv2d):
        return nn.Conv2d(
            head.in_channels,
            width,
            head.kernel_size,  # type: ignore[arg-type]
            head.stride,  # type: ignore[arg-type]
            head.padding,  # type: ignore[arg-type]
            head.dilation,  # type: ignore[arg-type]
            bias=bias,
            device=head.weight.device,
            dtype=head.weight.dtype,
        )
    raise AttributeError(f"the head to exchange is a {type(head).__name__}")
