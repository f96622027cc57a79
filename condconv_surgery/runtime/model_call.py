"""The arguments of a forward pass, by position and by keyword."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_BY_POSITION = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


class Keywords(dict[str, Any]):
    """The keyword arguments of a forward pass: the last item in the tuple of its arguments."""


pytree.register_pytree_node(
    Keywords,
    lambda keywords: (list(keywords.values()), list(keywords)),
    lambda values, names: Keywords(zip(names, values, strict=True)),
    serialized_type_name="condconv_surgery.Keywords",
)


def call(model: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """``model(*args, **keywords)``, where the last argument may be ``Keywords``."""
    if arguments and isinstance(arguments[-1], Keywords):
        return model(*arguments[:-1], **arguments[-1])
    return model(*arguments)


def arguments_of(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """The arguments that an example stands for: a tuple holds all of them, a mapping whose keys are parameters of the
    model's forward holds keywords; anything else is the only argument."""
    if isinstance(example, tuple):
        return example
    if isinstance(example, Mapping) and example and _takes(model, example):
        return (Keywords(example),)
    return (example,)


def image_arguments(model: nn.Module, images: Tensor) -> tuple[Any, ...]:
    """The arguments of a forward pass on images: by keyword where the model's forward takes nothing by position."""
    name = image_keyword(model)
    return (Keywords({name: images}),) if name else (images,)


def image_keyword(model: nn.Module) -> str:
    """The name of the images where the forward takes keywords only; empty where it takes them by position."""
    parameters = inspect.signature(model.forward).parameters.values()
    if not parameters or any(parameter.kind in _BY_POSITION for parameter in parameters):
        return ""
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    main = getattr(model, "main_input_name", None)  # transformers
    return main if isinstance(main, str) and main in names else next(iter(names), "")


def values_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of all arguments, without the names of keywords."""
    if arguments and isinstance(arguments[-1], Keywords):
        return (*arguments[:-1], *arguments[-1].values())
    return arguments


def _takes(model: nn.Module, keywords: Mapping[Any, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(**keywords)
    except (TypeError, ValueError):  # unknown, missing or no text; no signature
        return False
    return True
