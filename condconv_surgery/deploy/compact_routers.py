"""Routers for a graph: every constant folded, one linear map for all heads, and no factor on the gates.

    SigmoidGates     factor * sigmoid(linear(p))                     ->  sigmoid(linear(p)), and experts times factor
    Attention        relu(norm(reduce(p))), then for each head       ->  relu(reduce'(p)), then one linear map for all
                     2 * sigmoid(head(h) / T), softmax(head(h) / T)      sigmoid, softmax, and experts times 2 ** scales

which is the form of the papers (``ConditionalConv2d.paper_weights``). A small operator costs a runtime microseconds
for each call, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.deploy.fold_batch_norm import scale_and_shift
from condconv_surgery.layers import ConditionalConv2d, Router, routers
from condconv_surgery.layers.condconv import CondConvRouter
from condconv_surgery.layers.dynamicconv import DynamicConvRouter
from condconv_surgery.layers.find_layers import routed_layers
from condconv_surgery.layers.odconv import ODConvRouter
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import Attention, SigmoidGates
from condconv_surgery.ops.tracing_state import linear_parts

KNOWN = (CondConvRouter, DynamicConvRouter, ODConvRouter)
"""Whose ``mix`` is that of their ``fusable_form``, and of ODConv's gates beside it. Any other router stays as it is."""


class CompactRouter(nn.Module):
    """Maps [B, I, H, W] to the mixture of each sample, as the router from which ``make_routers_compact`` made it.

    reduce: [B, I] -> [B, hidden], or None. relu: behind it. heads: to the outputs of all heads side by side.
    widths: of the heads, None for one that is absent. softmax: of the last head; the others are sigmoids.
    gates: [B, I] -> [B, E], sigmoids beside the heads, or None. mixture_of: ``Router.mixture_of``.
    """

    def __init__(
        self,
        reduce: nn.Linear | None,
        relu: bool,
        heads: nn.Linear,
        widths: Sequence[int | None],
        softmax: bool,
        gates: nn.Linear | None,
        mixture_of: Callable[[list[Tensor | None]], Mixture],
    ) -> None:
        super().__init__()
        self.reduce, self.relu, self.heads, self.gates = reduce, relu, heads, gates
        self.widths, self.softmax, self.mixture_of = tuple(widths), softmax, mixture_of

    def forward(self, x: Tensor) -> Mixture:
        """The mixture of each sample of ``x`` [B, I, H, W]."""
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        h = pooled if self.reduce is None else self.reduce(pooled)
        z = self.heads(F.relu(h) if self.relu else h)
        present = [width for width in self.widths if width is not None]
        columns = list(z.split(present, 1)) if len(present) > 1 else [z]  # LiteRT has no split into one part
        last = torch.softmax(columns.pop(), 1) if self.softmax else None
        parts = [None if width is None or not columns else torch.sigmoid(columns.pop(0)) for width in self.widths]
        if last is not None:
            parts[-1] = last
        mixture = self.mixture_of(parts)
        return mixture if self.gates is None else mixture._replace(gate=torch.sigmoid(self.gates(pooled)))


@torch.no_grad()
def make_routers_compact(model: nn.Module) -> None:
    """Replace the routers of ``model`` by compact ones, and scale the experts that they mix, in place.

    A router stays as it is where it is not the package's own, has hooks or adapters, or mixes standardised kernels.
    """
    layers_of, places = routed_layers(model), _places(model)
    for name, router in routers(model).items():
        layers = layers_of[name]
        compact = None if any(layer.standardisation is not None for layer in layers) else _compact(router)
        if compact is None:
            continue
        for place in places[id(router)]:
            model.set_submodule(place, compact)
        for layer in layers:
            _scale_experts(layer, router.weight_factor, router.bias_factor)


def _places(model: nn.Module) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


def _scale_experts(layer: ConditionalConv2d[Any], weight: float, bias: float) -> None:
    layer.weight.mul_(weight)
    if layer.bias is not None:
        layer.bias.mul_(bias)


def _compact(router: Router) -> CompactRouter | None:
    """The compact form of ``router``, without its factors; None where it cannot be told from its parts."""
    form = router.fusable_form() if type(router) in KNOWN else None
    if isinstance(form, SigmoidGates):
        parts = linear_parts(form.linear)
        if parts is None:
            return None
        linear = _linear(*parts, parts[0].dtype)
        return CompactRouter(None, False, linear, [linear.out_features], False, None, router.mixture_of)
    return None if form is None else _compact_attention(router, form)


def _compact_attention(router: Router, form: Attention) -> CompactRouter | None:
    beside = router.linear if isinstance(router, ODConvRouter) else None
    maps = [None if head is None else linear_parts(head) for head in form.heads]
    present = [parts for parts in maps if parts is not None]
    reduce = linear_parts(form.reduce)
    gates = None if beside is None else linear_parts(beside)
    unknown = len(present) < sum(head is not None for head in form.heads) or (beside is not None and gates is None)
    if reduce is None or unknown or type(form.norm) not in (type(None), nn.BatchNorm1d):
        return None
    weight, bias = reduce
    dtype = weight.dtype
    if form.norm is not None:
        scale, shift = scale_and_shift(form.norm)
        weight, bias = weight.double() * scale[:, None], shift if bias is None else bias.double() * scale + shift
    weights = torch.cat([weight.double() for weight, _ in present]) / form.temperature
    biases = torch.cat([weight.new_zeros(len(weight)).double() if b is None else b.double() for weight, b in present])
    return CompactRouter(
        _linear(weight, bias, dtype),
        form.relu,
        _linear(weights, biases / form.temperature, dtype),
        [None if parts is None else len(parts[0]) for parts in maps],
        maps[-1] is not None,
        None if gates is None else _linear(*gates, dtype),
        router.mixture_of,
    )


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")  # draws no random numbers
    linear.weight = nn.Parameter(weight.to(dtype, copy=True))
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype, copy=True))
    return linear.requires_grad_(False)
