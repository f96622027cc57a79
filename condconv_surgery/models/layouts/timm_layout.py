"""State dicts as timm's EfficientNets with CondConv write them, in and out, exactly.

Their block has ``routing_fn``, a Linear from the pooled input of the block to plain sigmoids, and three convolutions
whose ``weight`` is flat, [E, O * I/G * kh * kw]. Our gates carry the factor 2/E: it goes into the experts
(``ConditionalConv2d.paper_weights``). Without the experts each of their networks is one of timm's plain ones.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import (
    CondConv2d,
    ConditionalConv2d,
    RoutedBlock,
    conditional_layers,
    routed_blocks,
)
from condconv_surgery.layers.conv2d_subclasses import geometry_of
from condconv_surgery.models.build_model import put_conditional
from condconv_surgery.models.checkpoints.recognise_architecture import recognise
from condconv_surgery.models.timm_source import require_timm
from condconv_surgery.ops.geometry import TF_SAME
from condconv_surgery.recipe import CondConv, ConvertedLayer, SharedRouter, Source
from condconv_surgery.surgery import BlockError, route_block

State = dict[str, Tensor]

_MARK = ".routing_fn.weight"
_NAME = re.compile(r"^timm:tf_efficientnet_cc_(b\d)_\d+e")
_BLOCK = "timm.models._efficientnet_blocks.InvertedResidual"
_EPS = 1e-3
_LAYERS = {"conv_pw", "conv_dw", "conv_pwl"}


def is_timm_layout(state: State) -> bool:
    """Some block of the state dict has timm's router."""
    return any(name.endswith(_MARK) for name in state)


def condconv_names() -> list[str]:
    """timm's networks with CondConv, whose state dicts have this layout."""
    return [name for name in require_timm().list_models("*_cc_*") if _NAME.match(f"timm:{name}")]


def recognise_timm(state: State) -> Source:
    """The one of ``condconv_names`` that has this state dict. Raises as ``recognise``."""
    return recognise({name: tuple(tensor.shape) for name, tensor in state.items()}, timm_names=condconv_names())


def plain_counterpart(source: Source) -> Source:
    """The network that one of ``condconv_names`` is without its experts; any other source is its own."""
    return Source(_NAME.sub(r"timm:tf_efficientnet_\1", source.name), source.options)


def read_timm_layout(model: nn.Module, state: State) -> State:
    """Put our layers and routers into the plain ``model``, in place, and return the file's tensors under our names.

    Raises ``InputError`` where the model has not the blocks and layers of the file.
    """
    for key in [name for name in state if name.endswith(_MARK)]:
        name = key.removesuffix(_MARK)
        try:
            shared = _shared_router(model.get_submodule(name), name, state)
            if departure := _departure(model.get_submodule(name)):
                raise AttributeError(f"{name} {departure}")
            for layer in shared.layers:
                put_conditional(model, ConvertedLayer((layer,), CondConv(len(state[key]), routing="block")))
            route_block(model, shared)
        except (AttributeError, BlockError) as error:
            raise InputError(
                f"The file has a router of CondConv for {name}, where the model does not fit: {error}.",
                "The model must be the file's network with plain convolutions.",
                "another arch=, or leave arch= out",
            ) from error
    return from_timm_layout(model, state)


def from_timm_layout(model: nn.Module, state: State) -> State:
    """timm's state dict under our names; ``model`` has our layers and routers in their places already.

    Equal outputs follow, up to the rounding of a division by 2/E: none where E is a power of two.
    """
    ours = dict(state)
    for name, block in routed_blocks(model).items():
        for leaf in ("weight", "bias"):
            ours[f"{name}.router.linear.{leaf}"] = ours.pop(f"{name}.routing_fn.{leaf}")
        for layer_name, layer in _layers_of(name, block).items():
            ours[f"{layer_name}.weight"] = ours[f"{layer_name}.weight"].view(layer.weight.shape) / layer.weight_factor
            if layer.bias is not None:
                ours[f"{layer_name}.bias"] = ours[f"{layer_name}.bias"] / layer.bias_factor
    return ours


def to_timm_layout(model: nn.Module) -> State:
    """The state dict of ``model`` as timm's ``create_model(NAME, checkpoint_path=...)`` loads it.

    Raises ``InputError`` for what timm's networks cannot hold: a layer with a router of its own or of another variant,
    a block of another class, padding or norm, a block some of whose convolutions are plain.
    """
    theirs: State = dict(model.state_dict())
    blocks = routed_blocks(model)
    routed = {f"{name}.{layer}" for name, block in blocks.items() for layer in block.block_routing.layers}
    alone = [name for name in conditional_layers(model) if name not in routed]
    if alone:
        raise _inexpressible(f"{alone[0]} has a router of its own")
    for name, block in blocks.items():
        _require_theirs(name, block)
        for leaf in ("weight", "bias"):
            theirs[f"{name}.routing_fn.{leaf}"] = theirs.pop(f"{name}.router.linear.{leaf}")
        for layer_name, layer in _layers_of(name, block).items():
            weight, bias = layer.paper_weights()
            theirs[f"{layer_name}.weight"] = weight.flatten(1)
            if bias is not None:
                theirs[f"{layer_name}.bias"] = bias
    return theirs


def _shared_router(block: nn.Module, name: str, state: State) -> SharedRouter:
    """The router of a block of the file. Raises ``AttributeError`` where it or a convolution has another shape."""
    router, bias = state[f"{name}{_MARK}"], state.get(f"{name}.routing_fn.bias")
    if router.dim() != 2 or bias is None or bias.shape != router.shape[:1]:
        raise AttributeError("a router has a weight [experts, channels] and a bias [experts]")
    experts, channels = router.shape
    layers: list[str] = []
    for inner, module in block.named_modules():
        weight = state.get(f"{name}.{inner}.weight")
        if not isinstance(module, nn.Conv2d) or weight is None or weight.dim() != 2:
            continue
        wanted = (experts, module.weight.numel())
        if weight.shape != wanted:
            raise AttributeError(f"{name}.{inner} needs a weight of {wanted}, the file's is {tuple(weight.shape)}")
        if not layers and module.in_channels != channels:
            raise AttributeError(f"its input has {module.in_channels} channels, the file's router takes {channels}")
        layers.append(f"{name}.{inner}")
    if not layers:
        raise AttributeError("none of its convolutions has a flat weight in the file")
    return SharedRouter(name, channels, tuple(layers))


def _departure(block: nn.Module) -> str:
    """What of a block is not as in TensorFlow, and so in all of ``condconv_names``; no tensor of a file would tell."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d) and module.eps != _EPS:
            return f"has a norm with eps={module.eps:g}, timm's networks with CondConv have {_EPS:g}"
        if isinstance(module, (nn.Conv2d, ConditionalConv2d)):
            g = module.geometry if isinstance(module, ConditionalConv2d) else geometry_of(module)
            if g.stride != (1, 1) and not g.pointwise and g.padding != TF_SAME:
                return f"pads by {g.padding}, timm's networks with CondConv by the size of the input"
    return ""


def _layers_of(name: str, block: RoutedBlock) -> dict[str, CondConv2d]:
    layers = {f"{name}.{inner}": block.get_submodule(inner) for inner in block.block_routing.layers}
    return {inner: layer for inner, layer in layers.items() if isinstance(layer, CondConv2d)}


def _require_theirs(name: str, block: RoutedBlock) -> None:
    cls = block.block_routing.plain
    if f"{cls.__module__}.{cls.__qualname__}" != _BLOCK:
        raise _inexpressible(f"{name} is a {cls.__name__}")
    if departure := _departure(block):
        raise _inexpressible(f"{name} {departure}")
    if len(_layers_of(name, block)) != len(block.block_routing.layers):
        raise _inexpressible(f"{name} is not converted to condconv")
    plain = sorted(_LAYERS - set(block.block_routing.layers))
    if plain or set(block.block_routing.layers) != _LAYERS:
        what = f"{name}.{plain[0]} is not converted" if plain else f"{name} has more converted layers than timm's"
        raise _inexpressible(what)


def _inexpressible(what: str) -> InputError:
    return InputError(
        f"{what}.",
        "timm's layout has CondConv, one router for each block, in all three convolutions of its InvertedResidual.",
        'routing="block", include=["blocks.[456].*"], exclude=["*.se.*"] with timm:tf_efficientnet_b0',
    )
