"""The backend in C++, for layers and routers on x86 processors; its switch is ``condconv_surgery.native``."""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.ops.backends.backend_protocol import Backend
from condconv_surgery.ops.backends.cpp import cpp_convolution, cpp_layer, cpp_routing
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture, same_kernel_for_all
from condconv_surgery.ops.tracing_state import is_intercepted

MAX_SCALED_SHARE = 2
"""Where scales are all that is mixed, kernels of up to this many times the elements of a sample's activations are
scaled rather than these: 0.7 to 1.0 of the time for 1x1 layers at 14 px, 1.0 to 1.3 at 7 px, in either mode."""


class CppBackend(Backend):
    """Supports nothing until it is enabled, then what it was measured to be faster at than eager torch."""

    name = "cpp"
    # without a method around them: a call takes as long as a small router
    fast_layer = staticmethod(cpp_layer.fast_layer)
    fast_convolve = staticmethod(cpp_convolution.fast_convolve)
    fast_rounded = staticmethod(cpp_convolution.fast_rounded)
    pool = staticmethod(cpp_routing.pool)
    route = staticmethod(cpp_routing.route)

    def supports(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry | ConvArguments, /) -> bool:
        return cpp_convolution.supports(x, experts, geometry)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, /) -> Tensor:
        return cpp_convolution.convolve(x, arguments, experts, mixture)

    def recorded_convolve(
        self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, /
    ) -> Tensor | None:
        return cpp_convolution.convolve_recorded(x, arguments, experts, mixture)

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
    ) -> list[Tensor | None]:
        return cpp_convolution.convolve_backward(grad, x, experts, mixture, arguments, needs)

    def applies_scales(
        self, implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /
    ) -> bool:
        return implementation == "blockwise" and cpp_convolution.supports(x, experts, geometry)

    def preferred_implementation(
        self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /
    ) -> str | None:
        if (
            mixture.gate is not None
            and cpp_convolution.has_narrow_groups(x, experts, geometry)
            and not is_intercepted()
        ):
            return "grouped"  # not in a compiled graph: it serves every batch, and this number of groups is of one
        scaled = mixture.in_scale is not None or mixture.out_scale is not None
        if not scaled or not same_kernel_for_all(mixture) or not cpp_convolution.supports(x, experts, geometry):
            return None
        return "blockwise" if geometry.weight_numel <= MAX_SCALED_SHARE * geometry.activations(x) else "static"
