"""ODConv: Omni-Dimensional Dynamic Convolution.

Li, Zhou, Yao, ICLR 2022, equation 3:

    y = (a_w1 . a_f1 . a_c1 . a_s1 . W_1 + ... + a_wn . a_fn . a_cn . a_sn . W_n) * x

with four attentions from one hidden vector ``h = relu(norm(FC(GAP(x))))``: over kernel positions (spatial), input
channels, filters (sigmoids of a linear map of h, / T) and experts (softmax of one, / T). As in the authors' code the
first three are shared by all experts; filters are absent for a depthwise layer, positions for a 1x1 kernel, experts
when there is one. The three sigmoids are doubled here: the scales of a zeroed router are 1, and an expert has the scale
of a trained kernel.

With ``spatial=False`` there is no attention over positions, which a constant kernel cannot have: with one expert the
layer is then a static convolution between two scales, as mobile runtimes need it.

With ``gates="sigmoid"`` the experts have CondConv's gates instead, from the pooled input itself: ``h`` is narrow, and
what the scales need of it is not what the experts need.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.router_base import Router, bare_linear_parts, router_for, temperature_buffer, zero_linear_
from condconv_surgery.layers.start_directions import (
    Features,
    outputs_of,
    standardise_outputs_,
    start_antithetic_,
    start_linear_,
)
from condconv_surgery.ops.dispatch import route
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import Attention, GatedAttention, SigmoidGates
from condconv_surgery.ops.tracing_state import norm_parts
from condconv_surgery.recipe import ODConv, Variant


@router_for(ODConv)
class ODConvRouter(Router):
    """Four heads over one hidden vector: [B, I] -> in_scale [B, I], out_scale [B, O], spatial [B, kh, kw], gate [B, E].

    With ``gates="sigmoid"`` the fourth is a linear map of the pooled input, and its gates are ``(2/E) sigmoid``.
    In training a batch of one is normalised by the running statistics: a single vector has no batch statistics.
    """

    temperature: Tensor

    def __init__(
        self,
        geometry: ConvGeometry,
        variant: ODConv,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = max(geometry.in_channels // variant.reduction, variant.min_hidden)
        normed = variant.norm == "batch"

        def head(width: int, present: bool) -> nn.Linear | None:
            return nn.Linear(hidden, width, device=device, dtype=dtype) if present else None

        everything = variant.heads == "all"
        self.kernel_size = geometry.kernel_size
        self.reduce = nn.Linear(geometry.in_channels, hidden, bias=not normed, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(hidden, device=device, dtype=dtype) if normed else None
        self.activation = variant.activation
        self.channel = nn.Linear(hidden, geometry.in_channels, device=device, dtype=dtype)
        self.filter = head(geometry.out_channels, everything or not geometry.depthwise)
        positions = self.kernel_size[0] * self.kernel_size[1]
        self.spatial = head(positions, variant.spatial and (everything or not geometry.pointwise))
        several, sigmoid = variant.experts > 1, variant.gates == "sigmoid"
        self.kernel = head(variant.experts, several and not sigmoid)
        self.linear = (
            nn.Linear(geometry.in_channels, variant.experts, device=device, dtype=dtype)
            if several and sigmoid
            else None
        )
        self.register_buffer("temperature", temperature_buffer(variant.temperature, device))
        self.bias_factor = 1.0 if self.linear is None else 2.0 / variant.experts
        doubled = sum(part is not None for part in (self.channel, self.filter, self.spatial))
        self.weight_factor = self.bias_factor * 2.0**doubled

    @classmethod
    def best_start(cls, variant: Variant) -> str:
        return "antithetic" if isinstance(variant, ODConv) and variant.gates == "sigmoid" else "softmax"

    def mix(self, pooled: Tensor) -> Mixture:
        heads = self._heads()
        z, widths = _outputs([head for head in heads if head is not None], self._hidden(pooled))
        z = z / self.temperature  # [B, I + O + kh*kw + E]
        gate = None if heads[-1] is None else torch.softmax(z[:, -widths[-1] :], dim=1)
        scales = list((2.0 * torch.sigmoid(z)).split_with_sizes(widths, 1))
        mixture = self.mixture_of([*(None if head is None else scales.pop(0) for head in heads[:3]), gate])
        return self._with_sigmoid_gates(mixture, pooled)

    def fusable_form(self) -> Attention:
        modules = self._modules  # an attribute lookup of a module takes ten times as long
        reduce, norm, temperature = modules["reduce"], modules.get("norm"), self._buffers["temperature"]
        assert reduce is not None
        assert temperature is not None
        return Attention(reduce, norm, self.activation == "relu", self._heads(), temperature)

    def whole_form(self) -> Attention | GatedAttention:
        linear, form = self._modules.get("linear"), self.fusable_form()
        return form if linear is None else GatedAttention(form, SigmoidGates(linear, self.bias_factor))

    def mixture_of(self, parts: list[Tensor | None]) -> Mixture:
        """From the outputs of the heads of channels, filters, positions and experts."""
        in_scale, out_scale, spatial, gate = parts
        spatial = None if spatial is None else spatial.reshape(-1, *self.kernel_size)
        return Mixture(gate, spatial, in_scale, out_scale)

    def _route(self, pooled: Tensor) -> Mixture:
        parts = None if "mix" in self.__dict__ else route(pooled, self.fusable_form())
        return self.mix(pooled) if parts is None else self._with_sigmoid_gates(self.mixture_of(parts), pooled)

    def _with_sigmoid_gates(self, mixture: Mixture, pooled: Tensor) -> Mixture:
        linear = self._modules.get("linear")
        if linear is None:
            return mixture
        gate: Tensor = linear(pooled)
        return mixture._replace(gate=self.bias_factor * torch.sigmoid(gate))

    def zero_(self) -> ODConvRouter:
        for part in (self.channel, self.filter, self.spatial, self.kernel, self.linear):
            if part is not None:
                zero_linear_(part)
        return self

    def start_(self, features: Features, spread: float, generator: torch.Generator) -> None:
        """Any logits of the experts: a softmax sums to 1; of sigmoids in antithetic pairs. The scales stay 1: their
        gradients are not zero there.

        Running statistics of the norm become those of the features, as which it normalises in training.
        """
        if self.linear is not None:
            start_antithetic_(self.linear, features, spread, generator)
        if self.kernel is None:
            return
        hidden = outputs_of(self.reduce, features)
        if self.norm is None:
            standardise_outputs_(self.reduce, features)
            hidden = outputs_of(self.reduce, features)
        else:
            mean, variance = hidden.mean(0), hidden.var(0, correction=0)
            for running, value in ((self.norm.running_mean, mean), (self.norm.running_var, variance)):
                assert running is not None
                running.copy_(value)
            hidden = (hidden - mean) / (variance + self.norm.eps).sqrt()
        hidden = F.relu(hidden) if self.activation == "relu" else hidden
        start_linear_(self.kernel, features._replace(values=hidden), spread, generator)

    def _heads(self) -> list[nn.Module | None]:
        """Of channels, filters, positions and experts; None where there is none."""
        modules = self._modules
        return [modules.get("channel"), modules.get("filter"), modules.get("spatial"), modules.get("kernel")]

    def _hidden(self, pooled: Tensor) -> Tensor:
        h = self.reduce(pooled)
        if self.norm is not None:
            h = _norm_any_batch(self.norm, h)
        return F.relu(h) if self.activation == "relu" else h


class ODConv2d(ConditionalConv2d[ODConv]):
    """A convolution with attention over positions, channels, filters and experts of its kernel, for each sample.

    ``y_b = f_b * conv(c_b * x_b, s_b * sum_e k_be W_e)``. The arguments are those of ``nn.Conv2d`` and an ``ODConv``.
    """

    variant_class = ODConv


def _outputs(heads: list[nn.Module], h: Tensor) -> tuple[Tensor, list[int]]:
    """The outputs of all heads side by side, and their widths.

    Bare ones are one matrix product: at batch 1 a small operator costs more than the copy of its weights. Anything else
    (hooks, adapters, quantised or sharded weights) is called.
    """
    weights, biases = [], []
    widths: list[Any] = []
    for head in heads:  # a loop, since a generator takes as long as a small operator
        weight, bias = bare_linear_parts(head) or (None, None)
        if weight is None or bias is None:
            outputs = [head(h) for head in heads]
            return torch.cat(outputs, dim=1), [output.shape[1] for output in outputs]
        weights.append(weight)
        biases.append(bias)
        widths.append(head.out_features)  # torch.jit.trace would record the length of a weight
    return F.linear(h, torch.cat(weights), torch.cat(biases)), widths


def _norm_any_batch(norm: nn.Module, h: Tensor) -> Tensor:
    """Batch norm of [B, hidden], by the running statistics for a batch of one or none in training."""
    if isinstance(norm, nn.BatchNorm1d):
        # in eval mode without hooks the call of a module takes as long as the norm
        parts = norm_parts(norm)
        if parts is not None:
            mean, variance, weight, bias = parts
            return F.batch_norm(h, mean, variance, weight, bias, False, 0.0, norm.eps)
        if norm.training and h.shape[0] <= 1:
            return F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    normed: Tensor = norm(h)
    return normed
