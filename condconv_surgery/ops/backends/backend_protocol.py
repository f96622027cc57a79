"""The protocol of a backend: what computes the implementation ``blockwise`` and fused routers (``ops.dispatch``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import RouterForm, WholeForm


class Backend(Protocol):
    """A peer that computes conditional convolutions: eager torch, C++, Triton.

    Subclass it, define ``name``, ``supports``, ``convolve`` and ``backward``, and override of the rest what the backend
    has. ``ops.dispatch.register_backend`` adds it. No method may compare the batch with anything but 0 and 1, so that
    one compiled graph serves every batch.
    """

    name: ClassVar[str]

    accepts_kernels: ClassVar[bool] = False
    """``convolve`` and ``backward`` take one more argument ``kernels``: all mixed kernels, [B, O, I/G, kh, kw]."""

    def supports(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry | ConvArguments, /) -> bool:
        """Whether ``convolve`` and ``backward`` compute this layer here. ``x`` [B, I, H, W] may be padded already."""
        ...

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, /) -> Tensor:
        """``y_b = out_scale_b * conv(in_scale_b * x_b, W_b)``: [B, I, H, W] -> [B, O, H', W'], without autograd.

        experts: [E, O, I/G, kh, kw]. The memory format of the output is that of ``x``.
        """
        ...

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
    ) -> Sequence[Tensor | None]:
        """The gradients of x, the experts and the four parts of the mixture, in this order.

        out: uninitialised tensors of their shapes; a gradient may be written there and returned, or be a new tensor.
        needs: which gradients are asked for; the others may be None.
        """
        ...

    def recorded_convolve(
        self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, /
    ) -> Tensor | None:
        """``convolve`` by an operator of the backend's own that autograd, compilers and profilers know, or None: then
        the operator of ``blockwise`` calls ``convolve`` and ``backward``."""
        return None

    def fast_layer(
        self,
        x: Tensor,
        experts: Tensor,
        bias: Tensor | None,
        form: WholeForm,
        geometry: ConvGeometry,
        scales: Tensor | None = None,
        /,
    ) -> Tensor | None:
        """A whole layer that routes for itself, where autograd records nothing, or None.

        experts: in the dtype of x; or as in ``fast_rounded``, with their scales.
        form: its one output is the gate, or its four outputs are in_scale, out_scale, spatial and gate.
        """
        return None

    def fast_convolve(
        self, implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /
    ) -> Tensor | None:
        """The whole convolution past torch's dispatcher, which costs as much as a small layer, or None.

        implementation: the chosen one, or ``"auto"`` before there is a choice. Return None where a call is traced,
        compiled or intercepted (``ops.tracing_state``).
        """
        return None

    def fast_rounded(
        self, x: Tensor, experts: Tensor, scales: Tensor | None, mixture: Mixture, geometry: ConvGeometry, /
    ) -> Tensor | None:
        """The whole convolution with experts in int8, times ``scales`` [E, O], or in bfloat16, or None: then they are
        converted to floats. As ``fast_convolve`` otherwise."""
        return None

    def applies_scales(
        self, implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /
    ) -> bool:
        """Whether ``in_scale`` and ``out_scale`` go into the kernels here, where that costs nothing or little."""
        return False

    def preferred_implementation(
        self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /
    ) -> str | None:
        """The implementation to choose, where this backend knows better than the cost model; else None."""
        return None

    def pool(self, x: Tensor, /) -> Tensor | None:
        """The mean over positions, [B, I, H, W] -> [B, I], or None."""
        return None

    def route(self, pooled: Tensor, form: RouterForm, /) -> list[Tensor | None] | None:
        """The outputs of a fused router (``ops.router_forms``) for ``pooled`` [B, I], or None."""
        return None
