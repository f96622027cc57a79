"""The backend in Triton, for layers and routers on a CUDA device. Where Triton is not installed it supports nothing."""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.ops.autocast import is_autocast_on
from condconv_surgery.ops.backend import Backend
from condconv_surgery.ops.backends.triton import fast_path, triton_convolution, triton_routing
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import RouterForm, SigmoidGates


class TritonBackend(Backend):
    """Dense and depthwise layers in float32 (where TF32 is allowed), bfloat16 or float16."""

    name = "triton"

    def supports(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry | ConvArguments, /) -> bool:
        return triton_convolution.supports(x, experts, mixture, geometry)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, /) -> Tensor:
        return triton_convolution.convolve(x, experts, mixture, arguments)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        experts: Tensor,
        mixture: Mixture,
        arguments: ConvArguments,
        out: list[Tensor],
        needs: list[bool],
        /,
    ) -> list[Tensor]:
        return triton_convolution.convolve_backward(grad, x, experts, mixture, arguments, out, needs)

    def fast_convolve(
        self, implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /
    ) -> Tensor | None:
        if implementation == "blockwise":
            return fast_path.fast_blockwise(x, experts, mixture, geometry)
        return fast_path.fast_plain(x, experts, mixture, geometry) if implementation == "plain" else None

    def applies_scales(
        self, implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /
    ) -> bool:
        return fast_path.applies_scales(implementation, x, experts, mixture, geometry)

    def pool(self, x: Tensor, /) -> Tensor | None:
        pooled = triton_routing.pool(x)  # in float32
        return pooled if pooled is None or is_autocast_on(x) else pooled.to(x.dtype)

    def route(self, pooled: Tensor, form: RouterForm, /) -> list[Tensor | None] | None:
        if not isinstance(form, SigmoidGates):
            return triton_routing.attention(pooled, form)
        gates = triton_routing.sigmoid_gates(pooled, form)
        return None if gates is None else [gates]
