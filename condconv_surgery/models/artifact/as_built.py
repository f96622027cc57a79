"""What a user's factory built, as text by module and attribute, so that ``save`` notices what was changed since.

The factory is not called again to compare: it may be slow, fetch weights or draw random numbers.
"""

from __future__ import annotations

import json

from torch import fx, nn

from condconv_surgery.layers import ConditionalConv2d, routed_blocks
from condconv_surgery.layers.find_layers import named_layers
from condconv_surgery.layers.routed_block import ROUTER, plain_class_of
from condconv_surgery.models.artifact.json_values import UndescribableError, ValueWriter
from condconv_surgery.models.artifact.library_marks import AS_BUILT
from condconv_surgery.models.artifact.skeleton import plain_state

Facts = dict[str, str]

UNKNOWN = "?"
"""Stands for a value that cannot be written, as a lambda; it equals any other."""

_WIDTHS = ("out_features", "out_channels", "weight", "bias")
"""What differs between a head and another one of another width."""


def note_as_built(model: nn.Module) -> nn.Module:
    """Store on ``model`` what its factory built; not of a traced graph, whose modules ``convert`` renames."""
    if not any(isinstance(module, fx.GraphModule) for module in model.modules()):
        setattr(model, AS_BUILT, _facts(model))
    return model


def note_not_as_built(model: nn.Module) -> nn.Module:
    """Store on ``model`` that the factory in its recipe builds another one."""
    setattr(model, AS_BUILT, {})
    return model


def is_as_built(model: nn.Module, heads: dict[str, int]) -> bool:
    """Whether ``model`` is still what its factory built, but for converted layers and ``heads`` of other widths.

    True where it was not noted: of a model that the user gave to ``load``.
    """
    built: Facts | None = model.__dict__.get(AS_BUILT)
    if built is None:
        return True
    if any(_width(model, name) not in (None, width) for name, width in heads.items()):
        return False
    names = [name for names, _ in named_layers(model, ConditionalConv2d) for name in names]
    names += [f"{name}.{ROUTER}".lstrip(".") for name in routed_blocks(model)]
    replaced = tuple(f"{name}{end}" for name in names for end in ":.")
    widths = {f"{name}:{key}" for name in heads for key in _WIDTHS}
    ours, theirs = (
        {key: text for key, text in facts.items() if not key.startswith(replaced) and key not in widths}
        for facts in (_facts(model), built)
    )
    return ours.keys() == theirs.keys() and all(
        text == theirs[key] or UNKNOWN in (text, theirs[key]) for key, text in ours.items()
    )


def _width(model: nn.Module, head: str) -> int | None:
    """Outputs of a plain head; ``None`` for a converted one, whose experts have them."""
    layer = model.get_submodule(head)
    if isinstance(layer, ConditionalConv2d):
        return None
    return len(layer.weight) if isinstance(layer, (nn.Linear, nn.Conv2d)) else -1


def _facts(model: nn.Module) -> Facts:
    """Of each name in the module tree: its class, plain attributes and the shapes of its parameters and buffers."""
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first.setdefault(id(module), name)

    def name_of(module: nn.Module) -> str:
        if id(module) not in first:
            raise UndescribableError("a module outside of the tree")
        return first[id(module)]

    writer = ValueWriter(name_of, {})
    facts: Facts = {}
    for name, module in model.named_modules(remove_duplicate=False):
        cls = plain_class_of(module)
        facts[f"{name}:"] = f"{cls.__module__}.{cls.__qualname__} as {first[id(module)]}"
        facts |= {f"{name}:{key}": _text(writer, value) for key, value in plain_state(module).items()}
        slots = {**module._parameters, **module._buffers}
        lasting = slots.keys() - module._non_persistent_buffers_set
        facts |= {f"{name}:{key}": f"{None if (t := slots[key]) is None else tuple(t.shape)}" for key in lasting}
    return facts


def _text(writer: ValueWriter, value: object) -> str:
    try:
        return json.dumps(writer.write(value, ""))
    except UndescribableError:
        return UNKNOWN
    finally:
        writer.stored.clear()
