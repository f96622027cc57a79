"""Build a model from its ``Source``; replace layers and heads by those that its recipe names."""

from __future__ import annotations

from torch import nn

from condconv_surgery.layers import conditional_like
from condconv_surgery.layers.conv2d_subclasses import geometry_of
from condconv_surgery.models.condconv_source import CONDCONV
from condconv_surgery.models.factory_source import FACTORY, require_trusted
from condconv_surgery.models.source_registry import builder_for, checked_model, register_source
from condconv_surgery.models.timm_source import TIMM
from condconv_surgery.models.torchvision_source import TORCHVISION
from condconv_surgery.models.transformers_source import TRANSFORMERS
from condconv_surgery.recipe import ConvertedLayer, Source
from condconv_surgery.surgery.upcycle import move_hooks

for _source in (FACTORY, CONDCONV, TIMM, TRANSFORMERS, TORCHVISION):
    register_source(_source)


def build(source: Source, trust: tuple[str, ...] = ()) -> nn.Module:
    """A fresh model with random weights, in eval mode.

    Raises ``InputError`` for a name that its library does not have, options that its factory does not take, or a
    factory of no registered source whose top-level package is not in ``trust``.
    """
    entry = builder_for(source.name)
    if entry is FACTORY:
        require_trusted(source, trust)
    assert entry.build is not None
    make = entry.build
    return checked_model(lambda: make(source), source)


def replace_heads(model: nn.Module, heads: dict[str, int]) -> None:
    """Replace the named final layers by fresh ones of the given output widths, in place.

    Raises ``AttributeError`` for a name that the model lacks or a module that is no head.
    """
    for name, width in heads.items():
        model.set_submodule(name, resized(model.get_submodule(name), width))


def put_conditional(skeleton: nn.Module, row: ConvertedLayer) -> None:
    """Replace a plain layer by an uninitialised conditional one with its hooks, at every name that it has.

    Raises ``AttributeError`` when the model has no such layer at the first name.
    """
    plain = skeleton.get_submodule(row.names[0])
    if not isinstance(plain, nn.Linear if row.linear else nn.Conv2d):
        raise AttributeError(f"{row.names[0]} is a {type(plain).__name__}")
    if plain.weight.shape[:2] != geometry_of(plain).weight_shape[:2]:
        raise AttributeError(f"{row.names[0]} has other channels than its weight")
    layer = conditional_like(plain, row.variant)
    if row.ungated_bias:
        layer.ungated_bias = nn.Parameter(plain.weight.new_zeros(layer.geometry.out_channels), requires_grad=False)
    move_hooks(plain, layer)
    for name in row.names:
        skeleton.set_submodule(name, layer, strict=True)


def resized(head: nn.Module, width: int) -> nn.Linear | nn.Conv2d:
    """A fresh head of another output width, otherwise the same. Raises ``AttributeError`` for any other module."""
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
    raise AttributeError(f"the head to replace is a {type(head).__name__}")
