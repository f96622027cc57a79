"""The protocol of an implementation: its legality, its cost and its code together."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture


class Implementation(Protocol):
    """Computes a per-sample convolution. All implementations are the same function (``Mixture``); they differ in cost.

    exportable: made of torch's operators, for any batch, so that an exported program runs without this package.
    serves_any_batch: exportable, and the operators that it calls for one batch compute any other too: none has the
    batch as an argument that is constant in ONNX and in a traced program (the groups of a convolution).
    chosen_on_cpu, chosen_on_gpu: worth an estimate there (``ops.choose_implementation``). scales_kernels: it can take
    ``in_scale`` and ``out_scale`` into its kernels. scales_are_in_its_cost: ``seconds`` holds for scaled kernels too.
    """

    name: ClassVar[str]
    exportable: ClassVar[bool] = True
    serves_any_batch: ClassVar[bool] = False
    chosen_on_cpu: ClassVar[bool] = False
    chosen_on_gpu: ClassVar[bool] = False
    scales_kernels: ClassVar[bool] = False
    scales_are_in_its_cost: ClassVar[bool] = False

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        """Why it cannot compute this layer on a batch of one or more, or None where it can."""
        ...

    def seconds(self, cost: LayerCost, /) -> float:
        """The estimated time of a forward pass of one sample."""
        ...

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        """[B, I, H, W] and experts [E, O, I/G, kh, kw] -> [B, O, H', W']. Scales of the mixture are None unless
        ``scales_kernels``."""
        ...


def needs_different_kernels(mixture: Mixture) -> str | None:
    """The reason of implementations that mix, where nothing is mixed."""
    return "all samples share one kernel" if mixture.gate is None and mixture.spatial is None else None


def needs_gates_alone(mixture: Mixture) -> str | None:
    """The reason of implementations that mix activations instead of kernels."""
    if mixture.spatial is not None:
        return "activations cannot be mixed by kernel position"
    return needs_different_kernels(mixture)
