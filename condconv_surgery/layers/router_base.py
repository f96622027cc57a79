"""What every router has (``Router``) and the registry; the router of a variant stands in the file of the variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers.start_directions import Features
from condconv_surgery.ops.autocast import is_autocast_on
from condconv_surgery.ops.dispatch import pool, route
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.graph_node import as_node, is_traced
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import RouterForm, WholeForm
from condconv_surgery.ops.tracing_state import linear_parts
from condconv_surgery.recipe import VARIANTS, Variant


class Router(nn.Module):
    """Maps the input of a layer, or of a block that routes once for its layers, to the mixture of each sample.

    A *zeroed* router (``zero_``) gives the neutral mixture for every input: gates that sum to 1, scales of 1.

    weight_factor, bias_factor: of experts and biases in the paper's form, which does not normalise the gates (see
    ``ConditionalConv2d.paper_weights``).
    """

    weight_factor: float = 1.0
    bias_factor: float = 1.0

    def __init_subclass__(cls, **options: Any) -> None:
        """A subclass that computes the mixture its own way has no form of its parent's, unless it says so."""
        super().__init_subclass__(**options)
        own = vars(cls)
        if any(name in own for name in ("forward", "_route", "mix")):
            for name in ("fusable_form", "whole_form", "_route"):
                if name not in own:
                    setattr(cls, name, getattr(Router, name))

    def forward(self, x: Tensor) -> Mixture:
        """The mixture of each sample of ``x`` [B, I, H, W], or [I, H, W], or [B, I] if it is pooled already.

        Under autocast the router computes in the precision of its weights: it is cheap, and the precision of the gates
        limits that of the mixed kernels.
        """
        if is_traced(x):
            node: Mixture = as_node(self, x)
            return node
        if x.dim() == 3:
            x = x.unsqueeze(0)
        pooled = pool(x) if x.dim() == 4 else x  # [B, I]
        if not is_autocast_on(x):
            return self._route(pooled)
        with torch.autocast(x.device.type, enabled=False):
            dtype = next((parameter.dtype for parameter in self.parameters()), torch.float32)  # none: quantised maps
            return self._route(pooled.to(dtype))

    def mix(self, pooled: Tensor) -> Mixture:
        """The mixture of each sample from its pooled features [B, I], with torch's operators."""
        raise NotImplementedError

    def fusable_form(self) -> RouterForm | None:
        """What ``mix`` computes, where a backend may fuse it into one call (``ops.router_forms``); else None."""
        return None

    def whole_form(self) -> WholeForm | None:
        """A form whose outputs are the whole mixture, with which a backend may compute the layer in one call: the gate
        alone, or in_scale, out_scale, spatial and gate. Else None."""
        return None

    def mixture_of(self, parts: list[Tensor | None]) -> Mixture:
        """The mixture from the outputs of ``fusable_form``."""
        return Mixture(parts[0])

    def _route(self, pooled: Tensor) -> Mixture:
        form = None if "mix" in self.__dict__ else self.fusable_form()  # replaced on the object
        parts = None if form is None else route(pooled, form)
        return self.mix(pooled) if parts is None else self.mixture_of(parts)

    @classmethod
    def best_start(cls, variant: Variant) -> str:
        """The best start of ``recipe.Upcycling`` for a router of ``variant``, made by ``start_`` if it is not noise."""
        return "noise"

    def zero_(self) -> Router:
        """Zero the last linear map or maps, in place."""
        raise NotImplementedError

    def start_(self, features: Features, spread: float, generator: torch.Generator) -> None:
        """Gates that vary over images and sum to 1 for any input, in place, for experts that are equal.

        spread: standard deviation of the logits over ``features``, before the temperature.
        """
        raise NotImplementedError


ROUTERS: dict[type[Variant], type[Router]] = {}

R = TypeVar("R", bound=type[Router])


def router_for(variant: type[Variant]) -> Callable[[R], R]:
    """Register the router class of a variant, which is called as ``(geometry, variant, device=, dtype=)``.

    With ``@variant("name")`` on the dataclass that is all that a new variant needs: its layer is ``ConditionalConv2d``,
    or the subclass of it with this ``variant_class``.
    """

    def register(cls: R) -> R:
        ROUTERS[variant] = cls
        return cls

    return register


def make_router(
    geometry: ConvGeometry,
    variant: Variant,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Router:
    """The router of ``variant`` for a layer of this geometry, zeroed. Raises as ``router_class``."""
    return router_class(variant)(geometry, variant, device=device, dtype=dtype).zero_()


def router_class(variant: Variant) -> type[Router]:
    """The router class of ``variant``. Raises ``InputError`` for a variant without a name or without a router."""
    cls = type(variant)
    if VARIANTS.get(cls.kind) is not cls:
        raise InputError(
            f"The variant {cls.__name__} has no name of its own.",
            f"An artifact finds a variant by its name; known: {', '.join(VARIANTS)}.",
            f'@variant("{cls.__name__.lower()}") above the dataclass',
        )
    if cls not in ROUTERS:
        raise InputError(
            f"The variant {cls.__name__} has no router.",
            f"Those with one: {', '.join(known.__name__ for known in ROUTERS)}.",
            f"@router_for({cls.__name__}) above a subclass of condconv_surgery.layers.Router with mix and zero_",
        )
    return ROUTERS[cls]


def bare_linear_parts(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias where using them is the same as calling ``module``: an ``nn.Linear`` without hooks or subclasses.

    A compiler's own tensor classes do not count: what it traces is compiled as one expression either way.
    """
    if torch.compiler.is_compiling():
        return (module.weight, module.bias) if type(module) is nn.Linear else None
    return linear_parts(module)


def zero_linear_(linear: nn.Linear) -> None:
    """Zero a linear map, in place."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def temperature_buffer(value: float, device: torch.device | str | None) -> Tensor:
    """A temperature as a buffer: a float32 scalar for layers of any dtype."""
    return torch.tensor(float(value), dtype=torch.float32, device=device)
