"""The layer: experts, bias, geometry and a router; forward is *route, then convolve*."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers.foreign_fusers import refuse_fuser, require_own_shape
from condconv_surgery.layers.router_base import Router, make_router
from condconv_surgery.layers.weight_forms.rounded_weight import RoundedWeight
from condconv_surgery.layers.weight_forms.weight_standardisation import WeightStandardisation
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.ops.dispatch import fast_layer
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.graph_node import as_node, is_traced
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.rounded_conv2d import rounded_conv2d
from condconv_surgery.ops.tracing_state import is_hooked, is_jit_traced
from condconv_surgery.recipe import Variant

if TYPE_CHECKING:
    from typing_extensions import Self

V = TypeVar("V", bound=Variant)


def _of_geometry(name: str) -> property:
    """An attribute of ``nn.Conv2d`` that models read from their convolutions (timm's DaViT pads by it)."""

    def read(self: ConditionalConv2d[Any]) -> Any:
        refuse_fuser()
        return getattr(self.geometry, name)

    return property(read, doc=f"As in ``nn.Conv2d``: ``geometry.{name}``.")


LAYERS: dict[type[Variant], type[ConditionalConv2d[Any]]] = {}
"""The layer class of each variant that has its own."""


class ConditionalConv2d(nn.Module, Generic[V]):
    """A drop-in for ``nn.Conv2d`` with several kernels, mixed for each sample.

        W_b = spatial_b * sum_e gate[b,e] * weight[e]
        y_b = out_scale_b * conv(in_scale_b * x_b, W_b) + sum_e gate[b,e] * bias[e]

    Shapes: input [B, I, H, W] or [I, H, W], output [B, O, H', W'] or [O, H', W']; ``weight`` [E, O, I/G, kh, kw],
    ``bias`` [E, O] or None. The variant says which mixture each sample gets. With ``variant.routing == "block"`` the
    layer has no router (``router`` is None) and is called with the mixture of each sample, which its block computes.

    A subclass with a ``variant_class`` is the layer of that variant, with its defaults (``CondConv2d``, ``ODConv2d``,
    ``DynamicConv2d``); a variant without a subclass uses this class.

    variant: the configuration, ``CondConv(experts=4)`` and the like; in a subclass ``None`` means its own defaults.
    standardisation: an attribute: of the weight at each call (``layers.weight_forms.weight_standardisation``), or None.
    rounding: an attribute: how ``weight`` is read where ``cs.round_experts`` made it int8 or bfloat16, or None.
    ungated_bias: an attribute: [O], added for every sample, or None. ``cs.fold`` makes it from a batch norm.
    implementation: an attribute, ``"auto"`` or the name of one implementation (``ops.implementations``).
    """

    variant_class: ClassVar[type[Variant]] = Variant

    in_channels = _of_geometry("in_channels")
    out_channels = _of_geometry("out_channels")
    kernel_size = _of_geometry("kernel_size")
    stride = _of_geometry("stride")
    padding = _of_geometry("padding")
    dilation = _of_geometry("dilation")
    groups = _of_geometry("groups")
    padding_mode = _of_geometry("padding_mode")

    bias: nn.Parameter | None
    ungated_bias: nn.Parameter | None
    router: Router | None
    standardisation: WeightStandardisation | None
    rounding: RoundedWeight | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | tuple[int, int, int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variant: V | None = None,
    ) -> None:
        super().__init__()
        variant = self.variant_class() if variant is None else variant  # type: ignore[assignment]
        if not isinstance(variant, self.variant_class) or type(variant) is Variant:
            raise InputError(
                f"{type(self).__name__} was given the variant {variant!r}.",
                f"It takes a {self.variant_class.__name__}.",
            )
        self.variant: V = variant
        self.geometry = ConvGeometry.make(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        self.weight = nn.Parameter(
            torch.empty(variant.experts, *self.geometry.weight_shape, device=device, dtype=dtype)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(variant.experts, out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_parameter("ungated_bias", None)
        routed = variant.routing == "layer"
        router = make_router(self.geometry, variant, device=device if routed else "meta", dtype=dtype)
        self.weight_factor, self.bias_factor = router.weight_factor, router.bias_factor
        self.router = router if routed else None
        self.register_module("standardisation", None)
        self.register_module("rounding", None)
        self.implementation = "auto"
        self.reset_parameters()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "variant_class" in vars(cls):
            LAYERS[cls.variant_class] = cls

    @property
    def experts(self) -> int:
        """How many kernels the layer holds."""
        return self.variant.experts

    def reset_parameters(self) -> None:
        """Random experts whose mean is distributed as the weight of a new ``nn.Conv2d``; a zeroed router.

        The mean of n independent kernels has 1/n of their variance, so each has sqrt(n) times the bound of
        ``nn.Conv2d``.
        """
        bound = math.sqrt(self.experts / math.prod(self.geometry.weight_shape[1:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.router is not None:
            self.router.zero_()

    def route(self, x: Tensor) -> Mixture:
        """The mixture of each sample of ``x`` [B, I, H, W], from the layer's own router.

        Raises ``InputError`` for a layer without a router.
        """
        if self.router is None:
            raise InputError(
                f'This {type(self).__name__} has no router: the router of its block serves it (routing="block").',
                "It is called with its input and the mixture of each sample.",
                "call the block instead of the layer, or layer(x, mixture)",
            )
        mixture: Mixture = self.router(x)
        return mixture

    def forward(self, input: Tensor, mixture: Mixture | None = None) -> Tensor:
        """input: [B, I, H, W] or [I, H, W]. mixture: of each sample; by default that of the layer's own router."""
        if mixture is None and not torch.is_grad_enabled():
            y = self._in_one_call(input)
            if y is not None:
                return self._with_ungated_bias(y)
        if is_traced(input):
            node: Tensor = as_node(self, input) if mixture is None else as_node(self, input, mixture)
            return node
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0), mixture).squeeze(0)
        if input.dim() != 4 or (not is_jit_traced() and input.shape[1] != self.geometry.in_channels):
            raise InputError(
                f"{type(self).__name__} was given an input of shape {tuple(input.shape)}.",
                f"It takes [B, {self.geometry.in_channels}, H, W] or [{self.geometry.in_channels}, H, W].",
            )
        self._require_floats(input)
        mixture = self.route(input) if mixture is None else mixture
        return self._with_ungated_bias(self.convolve(input, mixture))

    def convolve(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Mix and convolve, with the gated bias: [B, I, H, W] -> [B, O, H', W']."""
        experts: Tensor = self.weight
        if self.standardisation is not None:
            experts, mixture = self.standardisation(self.float_experts(), mixture)
        elif self.rounding is not None:
            scales = self.rounding.scale
            return rounded_conv2d(x, experts, scales, self.bias, mixture, self.geometry, self.implementation)
        return conditional_conv2d(x, experts, self.bias, mixture, self.geometry, self.implementation)

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of ``float_experts``."""
        return self.weight.dtype if self.rounding is None else torch.float32

    def float_experts(self) -> Tensor:
        """The experts as they are mixed: ``weight``, or what it stands for where it is rounded."""
        return self.weight if self.rounding is None else self.rounding(self.weight)

    def _require_floats(self, x: Tensor) -> None:
        """Kernels are mixed in the dtype of ``x``: integers would truncate them to zeros."""
        if not x.is_floating_point():
            raise InputError(
                f"{type(self).__name__} was given an input of {x.dtype}.",
                f"It takes floats, as its weights are: {self.exact_dtype}.",
                f"x.to({self.exact_dtype})",
            )

    def _in_one_call(self, x: Tensor) -> Tensor | None:
        """The whole layer by one call of a backend, or None: where the router or a part of it must be called."""
        modules, parts = self._modules, self._parameters  # attribute lookups of modules take ten times as long
        router = modules["router"]
        if router is None or modules["standardisation"] is not None or self.implementation != "auto":
            return None
        whole_form = (
            None if is_hooked(router) else getattr(router, "whole_form", None)
        )  # a router of one's own has none
        form = None if whole_form is None else whole_form()
        weight, rounding = parts.get("weight"), modules["rounding"]
        if form is None or weight is None or "bias" not in parts:  # computed, by a parametrization say
            return None
        scales = None if rounding is None else rounding._buffers["scale"]
        return fast_layer(x, weight, parts["bias"], form, self.geometry, scales)

    def _with_ungated_bias(self, y: Tensor) -> Tensor:
        ungated = self._parameters.get("ungated_bias")
        return y if ungated is None else y + ungated.to(y.dtype)[:, None, None]

    def paper_weights(self) -> tuple[Tensor, Tensor | None]:
        """Experts and bias as in the paper and in other implementations, whose routers have plain sigmoids.

        Ours times the router's ``weight_factor`` (CondConv 2/n; ODConv 2 for each sigmoid; DynamicConv 1).
        """
        bias = None if self.bias is None else self.bias.detach() * self.bias_factor
        return self.float_experts().detach() * self.weight_factor, bias

    @torch.no_grad()
    def load_paper_weights(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """The inverse of ``paper_weights``: the same function, whatever the router's state. Shapes as ours."""
        self.weight.copy_(weight / self.weight_factor)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias / self.bias_factor)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``, for assignments too. Raises ``InputError`` for what a fuser of nn.Conv2d would set."""
        if name in ("weight", "bias"):
            experts, weight = self.variant.experts, self.geometry.weight_shape
            require_own_shape(name, param, (experts, *weight) if name == "weight" else (experts, weight[0]))
        super().register_parameter(name, param)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in ``nn.Module``. Raises ``InputError`` for a fuser that passes over the layer."""
        refuse_fuser()
        return super().named_children()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        refuse_fuser(depth=3)  # behind copy.deepcopy
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in ``nn.Module``, which applies a memory format to every tensor with four or five dimensions.

        Five dimensions do not have ``channels_last``, so the experts are passed as rows and stay contiguous.
        """

        def of_rows(t: Tensor) -> Tensor:
            rows = t.flatten(1)
            changed = fn(rows)
            return t if changed is rows else changed.view(t.shape)

        super()._apply(lambda t: of_rows(t) if t.dim() == 5 and t.is_contiguous() else fn(t), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        g = self.geometry
        parts = [f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}"]
        if g.padding != (0, 0):
            parts.append(f"padding={g.padding!r}")
        if g.dilation != (1, 1):
            parts.append(f"dilation={g.dilation}")
        if g.groups != 1:
            parts.append(f"groups={g.groups}")
        if g.padding_mode != "zeros":
            parts.append(f"padding_mode={g.padding_mode!r}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join([*parts, f"variant={self.variant}"])
