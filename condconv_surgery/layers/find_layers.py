"""The conditional layers and routers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from condconv_surgery.errors import InputError, listed
from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.routed_block import RoutedBlock
from condconv_surgery.layers.router_base import Router
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import Variant

LARGEST_TEMPERATURE = 1e30
"""Well inside float32, in which routers hold it."""

RouterHook = Callable[[str, nn.Module, Any, Mixture], Mixture | None]
"""Takes the name, the module, the inputs and the mixture of a router; returns the mixture to use instead, if any."""


def conditional_layers(model: nn.Module) -> dict[str, ConditionalConv2d[Variant]]:
    """Every conditional layer of a model by its first name, each once however often it is shared."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ConditionalConv2d)}


def folded_layers(model: nn.Module) -> list[str]:
    """The first names of the layers into which ``deploy.fold`` folded a batch norm."""
    return [name for name, layer in conditional_layers(model).items() if layer.ungated_bias is not None]


def require_exact_experts(model: nn.Module, allowed: str) -> None:
    """Raise ``InputError`` for a model of ``deploy.round_experts``. allowed: what is needed, and why."""
    rounded = [name for name, layer in conditional_layers(model).items() if layer.rounding is not None]
    if rounded:
        raise InputError(
            f"The experts of the model are rounded, for inference: {listed(rounded)}.",
            allowed,
            "the model from before round_experts",
        )


def require_stored_experts(model: nn.Module) -> None:
    """Raise ``InputError`` where a parameter of a conditional layer or router is computed before each call.

    (By a parametrization, pruning or a norm of weights. A file holds the parameters, not how to compute them.)
    """
    for outer, module in model.named_modules():
        for inner, part in module.named_modules() if isinstance(module, ConditionalConv2d | Router) else ():
            computed = [name for name in ("weight", "bias") if name not in part._parameters]
            if computed and isinstance(part, ConditionalConv2d | nn.Linear):
                layer = f"{outer}.{inner}".strip(".")
                raise InputError(
                    f"{layer}.{computed[0]} is computed before each call.",
                    "A file holds experts and routers themselves.",
                    f'{_ending(part, computed[0])}(model.get_submodule("{layer}"), "{computed[0]}")',
                )


def _ending(module: nn.Module, name: str) -> str:
    """The function that makes a computed parameter an ordinary one."""
    if parametrize.is_parametrized(module, name):
        return "torch.nn.utils.parametrize.remove_parametrizations"
    return "torch.nn.utils." + ("prune.remove" if f"{name}_mask" in module._buffers else "remove_spectral_norm")


def named_layers(model: nn.Module, *kinds: type[nn.Module]) -> list[tuple[tuple[str, ...], Any]]:
    """Every module of these classes once, with all its names."""
    by_identity: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            by_identity.setdefault(id(module), ([], module))[0].append(name)
    return [(tuple(names), module) for names, module in by_identity.values()]


def routers(model: nn.Module) -> dict[str, Router]:
    """Every router of a model once, by the first name of the conditional layer or block that holds it."""
    modules = model.named_modules()
    return {name.rpartition(".")[0]: module for name, module in modules if isinstance(module, Router)}


@contextmanager
def router_hooks(model: nn.Module, hook: RouterHook) -> Iterator[None]:
    """Inside the block ``hook`` is called each time a router of ``model`` has run."""
    with ExitStack() as hooks:
        for name, router in routers(model).items():
            hooks.enter_context(router.register_forward_hook(partial(hook, name)))
        yield


def routed_layers(model: nn.Module) -> dict[str, list[ConditionalConv2d[Variant]]]:
    """The conditional layers that use the mixture of each router, by the router's name as in ``routers``."""
    layers = conditional_layers(model)
    found: dict[str, list[ConditionalConv2d[Variant]]] = {}
    for name in routers(model):
        block = model.get_submodule(name)
        names = (
            [f"{name}.{inner}" for inner in block.block_routing.layers] if isinstance(block, RoutedBlock) else [name]
        )
        found[name] = [layers[own] for own in names if own in layers]
    return found


def set_temperature(model: nn.Module, value: float) -> int:
    """Set the temperature of every router that has one; returns their number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_TEMPERATURE:
        raise InputError(
            f"The temperature is {value!r}.", "It must be a number in (0, 1e30].", "set_temperature(model, 30.0)"
        )
    buffers = [getattr(router, "temperature", None) for router in routers(model).values()]
    present = [buffer for buffer in buffers if buffer is not None]
    for buffer in present:
        buffer.fill_(value)
    return len(present)
