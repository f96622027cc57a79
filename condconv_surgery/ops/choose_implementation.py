"""Choose the implementation from shapes, device and mode alone: no timing, nothing that stops a compiler."""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.ops.bounded_cache import memoize
from condconv_surgery.ops.cost_model import LayerCost, rates_of, scales_belong_in_the_kernel
from condconv_surgery.ops.dispatch import preferred_implementation
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations import IMPLEMENTATIONS, legal_implementations
from condconv_surgery.ops.mixture import Mixture, same_kernel_for_all
from condconv_surgery.ops.per_sample.per_sample_conv import counts_as_cpu
from condconv_surgery.ops.tracing_state import is_exporting, is_exporting_to_onnx, is_intercepted

_USES = {"cpu": "chosen_on_cpu", "gpu": "chosen_on_gpu", "export": "exportable", "any batch": "serves_any_batch"}
"""The attribute of an implementation that says whether it is for a use."""

_choices: dict[tuple[object, ...], str] = {}


def choose(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    """The name of the implementation with the smallest ``estimate`` for ``x`` [B, I, H, W].

    The batch is compared only with 0 and 1, so that one compiled graph serves every batch.
    """
    batch = x.shape[0]
    if batch == 0:
        return "static"
    if batch == 1:
        return "static" if same_kernel_for_all(mixture) and not scales_belong_in_the_kernel(x, geometry) else "plain"
    names = candidates(mixture, geometry, _use(x))
    if len(names) > 1 or names == ["blockwise"]:  # the only one for a program is what it must have
        preferred = preferred_implementation(x, experts, mixture, geometry)
        if preferred is not None:
            return preferred
    if len(names) == 1:
        return names[0]
    if is_intercepted():  # sizes may be symbolic
        return _cheapest(names, x, experts, mixture, geometry)
    present = tuple(part is not None for part in mixture)
    key = (x.device.type, x.dtype, x.shape[2:], experts.shape[0], present, geometry)
    return _choices.get(key) or memoize(_choices, key, _cheapest(names, x, experts, mixture, geometry))


def choose_for_jit_trace(implementation: str, mixture: Mixture, geometry: ConvGeometry) -> str:
    """The name of an implementation that computes every batch, whatever the batch of the example.

    implementation: that of the layer, which stays if it does. No estimate: it would compare sizes that are recorded.
    """
    legal = candidates(mixture, geometry, "any batch")
    if implementation in legal:
        return implementation
    return next(name for name in ("static", "bmm", "unfold") if name in legal)


def candidates(mixture: Mixture, geometry: ConvGeometry, use: str) -> list[str]:
    """The implementations among which ``choose`` chooses for a batch of two or more.

    use: ``"cpu"`` or ``"gpu"``, a call there; ``"export"``, a program of ``torch.export``; ``"any batch"``, a program
        whose operators have constant arguments only, for ONNX or by ``torch.jit.trace``.

    ``blockwise`` does the work of ``grouped`` and ``bmm``, whichever is faster, with less memory traffic: of those that
    mix kernels only it is estimated, unless a program is made. On a GPU those that mix activations are too: there work
    costs less than memory traffic.
    """
    return [name for name in legal_implementations(2, mixture, geometry) if getattr(IMPLEMENTATIONS[name], _USES[use])]


def estimate(implementation: str, x: Tensor, experts: int, mixture: Mixture, geometry: ConvGeometry) -> float:
    """Seconds for one sample of ``x`` [B, I, H, W], which may be a meta tensor. The implementation must be legal."""
    chosen = IMPLEMENTATIONS[implementation]
    in_kernel = chosen.scales_are_in_its_cost and scales_belong_in_the_kernel(x, geometry)
    scaled = mixture.in_scale is not None or mixture.out_scale is not None
    one_kernel = same_kernel_for_all(mixture) and not (in_kernel and scaled)
    cost = LayerCost.of(x, experts, geometry, rates_of(x), one_kernel)
    seconds = chosen.seconds(cost)
    if mixture.in_scale is not None and not in_kernel:
        seconds += cost.write_and_read(cost.input_bytes)
    if mixture.out_scale is not None and not in_kernel:
        seconds += cost.write_and_read(cost.output_bytes)
    return seconds


def _use(x: Tensor) -> str:
    """What ``candidates`` are wanted for."""
    if is_exporting_to_onnx() and type(x.shape[0]) is not int:  # a symbol
        return "any batch"
    if is_exporting():
        return "export"
    return "cpu" if counts_as_cpu(x) else "gpu"


def _cheapest(names: list[str], x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    seconds = [estimate(name, x, experts.shape[0], mixture, geometry) for name in names]
    best = 0
    for i in range(1, len(names)):  # not min(): a compiler that keeps sizes symbolic cannot trace it
        if seconds[i] < seconds[best]:
            best = i
    return names[best]
