"""``package.module:factory``: a function of the user's own code that returns a model."""

from __future__ import annotations

import importlib
from dataclasses import replace

import torchvision
from torch import nn

from condconv_surgery.errors import InputError, nearest, unknown_name
from condconv_surgery.models.artifact.as_built import note_as_built
from condconv_surgery.models.checkpoints.allowlist import import_advice, trust_advice
from condconv_surgery.models.source_registry import builder_for, named_source
from condconv_surgery.recipe import Source


def named(text: str) -> Source:
    """The source of ``library:name``. Raises ``InputError`` for any other text, with the nearest known name."""
    library, colon, name = text.partition(":")
    if colon and library and name:
        return Source(text)
    known = torchvision.models.list_models()
    if text in known:
        raise InputError(f"{text!r} names no library.", "A name has its library before it.", f"torchvision:{text}")
    raise unknown_name(
        "model",
        text,
        known,
        "torchvision:NAME, timm:NAME, transformers:FOLDER, a file (.pt, .safetensors) or package.module:factory",
    )


def require_trusted(source: Source, trust: tuple[str, ...]) -> None:
    """Raise ``InputError`` unless ``trust`` has the top-level package of the factory."""
    package = package_of(source)
    if package not in trust:
        raise InputError(
            f"The model is built by {source.name}, code of the package {package!r}.",
            "Without trust= only torchvision, timm and registered sources are imported.",
            trust_advice(package, trust),
        )


def packages_to_trust(source: Source, trust: tuple[str, ...]) -> tuple[str, ...]:
    """``trust`` and the package of the factory that builds the source, for the next command on its artifact."""
    own = (package_of(source),) if source.name and builder_for(source.name) is FACTORY else ()
    return tuple(dict.fromkeys((*trust, *own)))


def package_of(source: Source) -> str:
    """The top-level package of the factory."""
    return source.name.partition(":")[0].partition(".")[0]


def _build(source: Source) -> nn.Module:
    module, _, name = named(source.name).name.partition(":")
    allowed = "A factory is package.module:function, importable from here."
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        fix = import_advice(module.partition(".")[0])
        raise InputError(f"{module}:{name} cannot be imported: {error}.", allowed, fix) from error
    if not callable(factory := getattr(home, name, None)):
        known = [key for key, value in vars(home).items() if callable(value) and value.__module__ == module]
        close = nearest(name, known, 1) or known[:1]
        fix = f"{module}:{close[0]}" if close else f"a function in {module}"
        raise InputError(f"{module}:{name} cannot be imported: {module} has no function {name!r}.", allowed, fix)
    model = factory(**source.options)
    return note_as_built(model) if isinstance(model, nn.Module) else model  # the caller says what it is instead


FACTORY = replace(named_source("factory", _build), matches=lambda text: True)
"""Loading one needs no ``trust``: naming a factory is trusting its package. What it returns has the weights it has."""
