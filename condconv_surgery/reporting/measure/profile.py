"""``profile``: count parameters and MACs of each layer of a model, before and after conversion."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear
from condconv_surgery.layers.router_base import Router
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.reporting.measure.cost_table import Layer, Macs, Profile
from condconv_surgery.reporting.measure.count_macs import Counts, ModuleCount, count
from condconv_surgery.reporting.measure.forward_arguments import arguments_for, one_sample
from condconv_surgery.runtime.model_call import values_of

ATTENTION_HEADS = ("channel", "filter", "spatial")
"""Submodules of a router that compute scales, not gates."""


def profile(model: nn.Module, inputs: Any = None) -> Profile:
    """Parameters and MACs of each layer, before and after conversion.

        after = before + sum over converted layers of  E*|W| (mixing) + I*E (routing, CondConv)
        parameters = before + sum of (E-1)*|W| + router

    A block's router is counted once, in its own row.
    inputs: see ``reporting.measure.forward_arguments.arguments_for``; of a batch, the first sample is counted.
    "Before" is derived: each conditional layer replaced a plain one of the same geometry.
    Cost: one forward pass, on the meta device where the model allows it.
    Raises ``InputError`` when the model does not run on the input, or has lazy parameters.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"{name} has no size yet.", "A lazy layer gets its size in the first forward pass.", "model(example)"
            )
    arguments = one_sample(arguments_for(model, inputs))
    counts = count(model, arguments)
    return Profile(tuple(_rows(model, counts)), _shapes_as_text(arguments))


def _rows(model: nn.Module, counts: Counts) -> list[Layer]:
    rows: list[Layer] = []
    owned: set[int] = set()  # ids of tensors counted in an earlier row
    inside: set[int] = set()  # ids of modules inside a conditional layer or router
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        counted = counts.modules.get(module, ModuleCount())
        if isinstance(module, ConditionalConv2d):
            inside.update(id(part) for part in module.modules())
            rows.append(_conditional_row(name, module, counted, counts, owned))
            continue
        if isinstance(module, Router):
            inside.update(id(part) for part in module.modules())
            rows.append(_router_row(name, module, counted, counts, owned))
            continue
        parameters, size = _own_tensors(module, owned, recurse=False)
        if parameters or counted.macs:
            rows.append(_plain_row(name, module, counted, parameters, size))
    if counts.outside:
        rows.append(_row("", "outside any module", ModuleCount(macs=counts.outside), Macs(counts.outside)))
    return rows


def _plain_row(name: str, module: nn.Module, counted: ModuleCount, parameters: int, size: int) -> Layer:
    weight = module._parameters.get("weight")
    return _row(
        name,
        type(module).__name__,
        counted,
        Macs(convolution=counted.macs),
        shape=tuple(weight.shape) if weight is not None else (),
        geometry=_geometry(module),
        parameters=(parameters, parameters),
        weight_bytes=(size, size),
    )


def _conditional_row(
    name: str, layer: ConditionalConv2d[Any], counted: ModuleCount, counts: Counts, owned: set[int]
) -> Layer:
    gain = getattr(layer.standardisation, "gain", None)
    plain = layer.geometry.weight_numel + layer.geometry.out_channels * ((layer.bias is not None) + (gain is not None))
    parameters, size = _own_tensors(layer, owned, recurse=True)
    return _row(
        name,
        layer.variant.kind,
        counted,
        _conditional_macs(layer, counted, counts),
        shape=layer.geometry.weight_shape,
        geometry=_geometry(layer.geometry),
        parameters=(plain, parameters),
        weight_bytes=(plain * layer.exact_dtype.itemsize, size),
        experts=layer.experts,
        conditional=True,
    )


def _router_row(name: str, router: Router, counted: ModuleCount, counts: Counts, owned: set[int]) -> Layer:
    """A block's router: before conversion there was nothing."""
    parameters, size = _own_tensors(router, owned, recurse=True)
    macs = Macs(routing=_macs_inside(router, counts))
    return _row(name, "router", counted, macs, parameters=(0, parameters), weight_bytes=(0, size))


def _row(
    name: str,
    kind: str,
    counted: ModuleCount,
    macs: Macs,
    *,
    shape: tuple[int, ...] = (),
    geometry: str = "",
    parameters: tuple[int, int] = (0, 0),
    weight_bytes: tuple[int, int] = (0, 0),
    experts: int = 1,
    conditional: bool = False,
) -> Layer:
    return Layer(
        name=name,
        kind=kind,
        shape=shape,
        geometry=geometry,
        experts=experts,
        calls=len(counted.outputs),
        parameters=parameters[1],
        parameters_before=parameters[0],
        macs=macs,
        weight_bytes=weight_bytes[1],
        weight_bytes_before=weight_bytes[0],
        activation_bytes=counted.output_bytes,
        activation_values=counted.output_values,
        conditional=conditional,
    )


def _conditional_macs(layer: ConditionalConv2d[Any], counted: ModuleCount, counts: Counts) -> Macs:
    """By the cost rule, not as counted: the implementation changes the products in a batch, not the cost per image."""
    width = layer.geometry.out_channels
    unbatched = 1 if isinstance(layer, ConditionalLinear) else 3
    samples = sum(shape[0] if len(shape) > unbatched else 1 for shape in counted.outputs)
    positions = sum(math.prod(shape) for shape in counted.outputs) // width  # over all samples and calls
    mixed = layer.experts * (layer.geometry.weight_numel + (width if layer.bias is not None else 0))
    if layer.router is None:  # a block's router always has gates; it has its own row
        mixing = samples * mixed + _macs_of_norms(layer, samples, len(counted.outputs))
        return Macs(convolution=positions * layer.geometry.weight_numel, mixing=mixing)
    routed = counts.modules.get(layer.router)
    mixture = routed.result if routed else None
    gated = isinstance(mixture, Mixture) and mixture.gate is not None
    heads = [part for name, part in layer.router.named_modules() if name in ATTENTION_HEADS]
    # From the weights: a router may compute all heads in one product, and a hook on a head would not be called.
    attention = samples * sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))
    return Macs(
        convolution=positions * layer.geometry.weight_numel,
        mixing=samples * mixed + _macs_of_norms(layer, samples, len(counted.outputs)) if gated else 0,
        routing=_macs_inside(layer.router, counts) - attention,
        attention=attention,
    )


def _macs_of_norms(layer: ConditionalConv2d[Any], samples: int, calls: int) -> int:
    """MACs of weight standardisation: the experts' inner products, once per call, and each sample's norm from them."""
    if layer.standardisation is None:
        return 0
    pairs = layer.experts**2
    return pairs * (calls * layer.geometry.weight_numel + samples * layer.geometry.out_channels)


def _macs_inside(module: nn.Module, counts: Counts) -> int:
    return sum(counts.modules.get(part, ModuleCount()).macs for part in module.modules())


def _own_tensors(module: nn.Module, owned: set[int], *, recurse: bool) -> tuple[int, int]:
    """Number of parameters, and bytes of parameters and buffers, that no earlier row has counted."""
    parameters = size = 0
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        if id(tensor) in owned:
            continue
        owned.add(id(tensor))
        size += tensor.numel() * tensor.element_size()
        parameters += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
    return parameters, size


def _geometry(module: Any) -> str:
    """``64>128 3x3 /2 g32``; ``96 3x3 dw`` if depthwise; empty for a module without channels."""
    if hasattr(module, "in_features"):
        return f"{module.in_features}>{module.out_features}"
    if not hasattr(module, "kernel_size") or not hasattr(module, "in_channels"):
        return ""
    kernel = "x".join(str(side) for side in module.kernel_size)
    if module.groups == module.in_channels == module.out_channels and module.groups > 1:
        text = f"{module.in_channels} {kernel} dw"
    else:
        text = f"{module.in_channels}>{module.out_channels} {kernel}"
        text += f" g{module.groups}" if module.groups > 1 else ""
    strides = set(module.stride)
    return text + (f" /{max(strides)}" if strides != {1} else "")


def _shapes_as_text(arguments: tuple[Any, ...]) -> str:
    values = values_of(arguments)
    return ", ".join("x".join(map(str, a.shape)) if hasattr(a, "shape") else type(a).__name__ for a in values)
