"""Give a network the stem and the head that a file of weights has, where all between them fits.

Each change is logged, and what stays random with it: a file need not hold the head that the architecture has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from condconv_surgery.errors import listed
from condconv_surgery.models.checkpoints.outer_layers import OuterLayers, body_fits, outer_layers, shapes_of

HEADS = ("classifier", "cls", "fc", "head", "last_linear", "linear", "logits")
"""Names under which networks hold a classifier beside their body."""

_LOG = logging.getLogger("condconv_surgery")

State = dict[str, Tensor]


def adapt(model: nn.Module, state: State, own: Mapping[str, Tensor], what: str) -> tuple[State, dict[str, int]]:
    """``state`` with every tensor of ``model``, whose stem and head become, in place, those of the file.

    state: names as the model has them. own: all tensors of the file. what: the file, in log lines.
    Returns it with the new width of the head, by the name of its last layer, if it has another one. Where more than
    stem and head differ, all stays as it is.
    """
    network, given = shapes_of(model.state_dict()), shapes_of(state)
    outer = outer_layers(network)
    if outer is None or given == network or not body_fits(network, given):
        return state, {}
    if given[outer.stem] != network[outer.stem] or (outer.stem_bias in given) != (outer.stem_bias in network):
        _take_stem(model, outer, state)
        _LOG.warning(
            "%s: %s takes %d channels, as in the file; its stride and padding are taken to be the architecture's",
            *(what, outer.stem, given[outer.stem][1]),
        )
    layer = model.get_submodule(outer.head)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    before = len(layer.weight)
    taken = _classifier(layer, outer, state, own, what)
    if taken and len(taken["weight"]) != before:
        _resize(layer, len(taken["weight"]))
    whole = _with_own_head(model, outer, state, taken, what)
    return whole, {outer.head: len(layer.weight)} if len(layer.weight) != before else {}


def _classifier(
    layer: nn.Linear | nn.Conv2d, outer: OuterLayers, state: State, own: Mapping[str, Tensor], what: str
) -> State:
    """Weight and bias of the file's last layer: the only layer of its head, which may have another name; else none.

    A dropout before it, which has no tensors, does not change what a trained network computes.
    """
    inside = {name: tensor for name, tensor in state.items() if name.startswith(outer.group)}
    named = {
        name: tensor
        for name, tensor in own.items()
        if name.rpartition(".")[0].rpartition(".")[2] in HEADS and not any(tensor is t for t in state.values())
    }
    name = outer.head
    if f"{name}.weight" not in inside:
        inside = inside or named
        name, *others = [key.removesuffix(".weight") for key in inside if key.endswith(".weight")] or [""]
        if others or inside.keys() - {f"{name}.weight", f"{name}.bias"}:
            return {}
    weight = inside.get(f"{name}.weight")
    if weight is None or weight[0].numel() != layer.weight[0].numel():
        return {}
    if name != outer.head:
        _LOG.warning("%s: took %s as the head %s, %d classes", what, f"{name}.weight", outer.head, len(weight))
    elif len(weight) != len(layer.weight):
        _LOG.warning("%s: %d classes, as in the file", what, len(weight))
    taken = {"weight": weight.reshape(len(weight), *layer.weight.shape[1:])}
    if layer.bias is not None:
        taken["bias"] = inside.get(f"{name}.bias", torch.zeros(len(weight), dtype=weight.dtype))
    return taken


def _with_own_head(model: nn.Module, outer: OuterLayers, state: State, taken: State, what: str) -> State:
    """``state`` with a head that has the model's names: ``taken``, what fits of the file's, else the model's own."""
    mine = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(outer.group)}
    body = {name: tensor for name, tensor in state.items() if not name.startswith(outer.group)}
    head = {name: tensor for name, tensor in state.items() if name in mine and tensor.shape == mine[name].shape}
    head |= {f"{outer.head}.{part}": tensor for part, tensor in taken.items()}
    random = [name for name in mine if name not in head and not name.endswith("num_batches_tracked")]
    if random:
        left = [name for name in state if name not in body and name not in head]
        _say_random(what, random, left)
    dtype = next((tensor.dtype for tensor in body.values() if tensor.is_floating_point()), torch.float32)
    rest = {name: t.to(dtype) if t.is_floating_point() else t for name, t in mine.items() if name not in head}
    return {**body, **head, **rest}


def _say_random(what: str, random: list[str], left: list[str]) -> None:
    if not left:
        _LOG.warning("%s: the file has no head: %s is random until it is trained", what, listed(random))
        return
    _LOG.warning(
        "%s: left out the file's head (%s), which is not the architecture's: %s is random until it is trained; "
        "a function of yours that builds the whole network keeps it (package.module:function, this file as weights)",
        what,
        listed(left),
        listed(random),
    )


def _resize(layer: nn.Linear | nn.Conv2d, width: int) -> None:
    """Another number of outputs, in place, with uninitialised weights."""
    layer.weight = nn.Parameter(layer.weight.new_empty((width, *layer.weight.shape[1:])))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(width))
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", width)


def _take_stem(model: nn.Module, outer: OuterLayers, state: State) -> None:
    """The channels of the file's stem, and its bias or none, in place, with uninitialised weights."""
    stem, weight = model.get_submodule(outer.stem.removesuffix(".weight")), state[outer.stem]
    assert isinstance(stem, nn.Conv2d)
    stem.weight = nn.Parameter(stem.weight.new_empty(weight.shape))
    stem.bias = nn.Parameter(stem.weight.new_empty(len(weight))) if outer.stem_bias in state else None
    stem.in_channels = weight.shape[1] * stem.groups
