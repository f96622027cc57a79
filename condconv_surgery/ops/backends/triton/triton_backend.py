"""The backend in Triton, for layers and routers on a CUDA device. Where Triton is not installed it supports nothing."""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.ops.autocast import is_autocast_on
from condconv_surgery.ops.backends.backend_protocol import Backend
from condconv_surgery.ops.backends.triton import fast_path, triton_convolution, triton_routing
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture


class TritonBackend(Backend):
    """Dense and depthwise layers in float32 (where TF32 is allowed), bfloat16 or float16."""

    name = "triton"
    # without a method around them: a call takes as long as a small router
    fast_convolve = staticmethod(fast_path.fast_convolve)
    applies_scales = staticmethod(fast_path.applies_scales)
    route = staticmethod(triton_routing.route)

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

    def pool(self, x: Tensor, /) -> Tensor | None:
        pooled = triton_routing.pool(x)  # in float32
        return pooled if pooled is None or is_autocast_on(x) else pooled.to(x.dtype)
