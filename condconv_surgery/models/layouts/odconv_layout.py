"""State dicts as the authors of ODConv write them, in and out, exactly.

Their layer holds ``weight`` [E, O, I/G, k, k] and, under ``attention.``, 1x1 convolutions ``fc``, ``channel_fc``,
``filter_fc``, ``spatial_fc``, ``kernel_fc`` and the norm ``bn``. Our router has the same maps as Linears, and our
sigmoids are doubled: the factor goes into the experts (``ConditionalConv2d.paper_weights``). Their temperature is 1 and
not in the file; another one of ours is divided into the maps that it divides.
"""

from __future__ import annotations

from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, ODConv2d, conditional_layers
from condconv_surgery.models.build_model import put_conditional
from condconv_surgery.ops.geometry import TF_SAME
from condconv_surgery.recipe import ConvertedLayer, ODConv, Variant

State = dict[str, Tensor]

_MAPS = {"reduce": "fc", "channel": "channel_fc", "filter": "filter_fc", "spatial": "spatial_fc", "kernel": "kernel_fc"}
_NAMES = {**_MAPS, "norm": "bn"}
_MARK = ".attention.fc.weight"


def is_odconv_layout(state: State) -> bool:
    """Some layer of the state dict has the authors' attention."""
    return any(name.endswith(_MARK) for name in state)


def without_attention(state: State) -> State:
    """The state dict that the network had with plain convolutions: one kernel for each layer, no attention."""
    layers = {name.removesuffix(_MARK) for name in state if name.endswith(_MARK)}
    plain = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in layers:
            plain[name] = tensor[0] if tensor.dim() == 5 else tensor
        elif layer.partition(".attention")[0] not in layers:
            plain[name] = tensor
    return plain


def read_odconv_layout(model: nn.Module, state: State) -> State:
    """Put our layers where the file has ODConv's, in place, and return its tensors under our names.

    Equal outputs follow, up to the rounding of a multiplication by a power of two: none.
    """
    try:
        for row in _odconv_layers(state):
            put_conditional(model, row)
    except AttributeError as error:
        raise InputError(
            f"The file has ODConv layers that the model has not: {error}.",
            "Each must be a convolution of the model.",
            "another arch=",
        ) from error
    ours = dict(state)
    for name, layer in conditional_layers(model).items():
        ours[f"{name}.weight"] = state[f"{name}.weight"] / layer.weight_factor
        for our, their in _NAMES.items():
            start = f"{name}.attention.{their}."
            for key in [key for key in ours if key.startswith(start)]:
                tensor = ours.pop(key)
                ours[f"{name}.router.{our}.{key.removeprefix(start)}"] = (
                    tensor.flatten(1) if tensor.dim() > 1 else tensor
                )
    return ours


def to_odconv_layout(model: nn.Module) -> State:
    """The state dict of ``model``, all of whose conditional layers are ODConv's, as the authors' code loads it.

    Raises ``InputError`` for a layer that their class cannot hold: another variant, a bias, a kernel that is not
    square, another attention than the published one.
    """
    theirs: State = dict(model.state_dict())
    for name, layer in model.named_modules(remove_duplicate=False):  # a shared layer is there under each of its names
        if not isinstance(layer, ConditionalConv2d):
            continue
        _require_theirs(name, layer)
        temperature = theirs.pop(f"{name}.router.temperature")
        theirs[f"{name}.weight"] = layer.paper_weights()[0]
        for our, their in _NAMES.items():
            start = f"{name}.router.{our}."
            for key in [key for key in theirs if key.startswith(start)]:
                tensor = theirs.pop(key)
                if our in _MAPS:
                    tensor = tensor if our == "reduce" else tensor / temperature.to(tensor.dtype)
                    tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
                theirs[f"{name}.attention.{their}.{key.removeprefix(start)}"] = tensor
    return theirs


def _odconv_layers(state: State) -> tuple[ConvertedLayer, ...]:
    rows = []
    for name, fc in state.items():
        if name.endswith(_MARK):
            layer = name.removesuffix(_MARK)
            weight = state.get(f"{layer}.weight")
            if weight is None or weight.dim() != 5 or fc.dim() != 4:
                raise InputError(
                    f"{layer} has ODConv's attention but not its weight.",
                    "The authors' layer has a weight [experts, O, I/G, k, k] and an attention of 1x1 convolutions.",
                )
            rows.append(ConvertedLayer((layer,), _variant(weight.shape[0], *fc.shape[:2])))
    return tuple(rows)


def _variant(experts: int, hidden: int, channels: int) -> ODConv:
    usual = ODConv(experts)
    if hidden == max(channels // usual.reduction, usual.min_hidden):
        return usual
    return ODConv(experts, reduction=channels, min_hidden=hidden)


def _require_theirs(name: str, layer: ConditionalConv2d[Variant]) -> None:
    g = layer.geometry
    wrong = [
        reason
        for reason, holds in (
            (f"is a {type(layer).__name__}", not isinstance(layer, ODConv2d)),
            ("has a bias", layer.bias is not None),
            (f"has a kernel of {g.kernel_size}", g.kernel_size[0] != g.kernel_size[1]),
            (f"pads with {g.padding_mode}", g.padding_mode != "zeros"),
            ("pads by the size of its input", g.padding == TF_SAME),
            ("pads its sides by different amounts", g.by_side),
            ("standardises its weight", layer.standardisation is not None),
            (f"has the attention of {layer.variant}", _departs(layer.variant)),
            ("has no attention over kernel positions", _lacks_positions(layer)),
        )
        if holds
    ]
    if wrong:
        raise InputError(
            f"{name} {wrong[0]}.",
            "The authors' ODConv has square kernels padded with zeros, no bias, and the published attention.",
            "cs.save keeps any layer",
        )


def _lacks_positions(layer: ConditionalConv2d[Variant]) -> bool:
    """Their class makes that head for every kernel that is not 1x1."""
    return isinstance(layer.variant, ODConv) and not layer.variant.spatial and not layer.geometry.pointwise


def _departs(variant: Variant) -> bool:
    """Whether the attention is not the authors'."""
    return not isinstance(variant, ODConv) or (variant.norm, variant.activation, variant.heads, variant.gates) != (
        "batch",
        "relu",
        "paper",
        "softmax",
    )
