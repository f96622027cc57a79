"""Some samples and filters at a time: mix their kernels, use them, drop them, and mix them again for backward.

    y_b = conv(x_b, K_b),    K_b = out_scale_b * in_scale_b * spatial_b * sum_e gate[b,e] * experts[e]

The kernels of a whole batch have B * |W| elements (1.4 GB for ResNet-18 at batch 32). They would be written to fresh
memory, read back once, and saved for backward. Here few exist at a time, in a buffer that stays warm; only small ones
are saved for backward (``MAX_KEPT_SHARE``). It is one custom operator with its own backward formula, so that a compiler
sees one node for any batch size, and a backend computes it. Where its gradients are to be differentiated again, or
``torch.func`` transforms the call, torch's operators compute it (``per_sample.second_order``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from condconv_surgery.ops.cost_model import CPU, LayerCost
from condconv_surgery.ops.dispatch import backend_for
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import empty_gradients, mix_batch
from condconv_surgery.ops.per_sample.per_sample_conv import empty_output
from condconv_surgery.ops.per_sample.second_order import convolve_by_torch, needs_recording, recorded_gradients
from condconv_surgery.ops.tracing_state import are_plain, is_intercepted, is_transformed

MAX_KEPT_SHARE = 3
"""Kernels of a sample with up to this many times the elements of its activations are saved for backward rather than
mixed again. It adds little to a network, since layers of large maps hold most of its activations and few of its
weights."""


class Blockwise(Implementation):
    """The custom operator ``condconv_surgery::convolve_blockwise``."""

    name = "blockwise"
    exportable = False  # an exported program must run where this package is not installed
    chosen_on_cpu = chosen_on_gpu = True
    scales_kernels = scales_are_in_its_cost = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return None

    def seconds(self, cost: LayerCost, /) -> float:
        # mixed into a warm buffer, brought into the backend's layout; outputs of blocks are copied into one tensor
        kernels = 0 if cost.one_kernel else 2 * cost.kernel_bytes
        copied = cost.output_bytes if cost.geometry.groups > 1 and cost.rates is CPU else 0
        multiplied = cost.matrix_product() if cost.geometry.pointwise else cost.convolution_per_sample()
        return multiplied + (kernels + copied) / cost.rates.warm

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        x, arguments = geometry.pad(x)
        if is_transformed():
            return convolve_by_torch(x, experts, mixture, arguments)
        backend = backend_for(x, experts, mixture, geometry)
        own = backend.recorded_convolve(x, experts, mixture, arguments)
        if own is not None:
            return own
        if not torch.is_grad_enabled() and not is_intercepted() and are_plain(x, experts, *mixture):
            return backend.convolve(x, experts, mixture, arguments)  # the operator takes as long as a small layer
        keep = torch.is_grad_enabled() and _keeps_kernels(x, experts, mixture, geometry)
        y: Tensor = _forward(x, experts, *mixture, *arguments, keep)[0]
        return y


def _keeps_kernels(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> bool:
    """Whether forward saves the kernels for backward. Scaled ones never: their gradients need them unscaled too."""
    if mixture.gate is None or any(part is not None for part in mixture[1:]):
        return False
    if not backend_for(x, experts, mixture, geometry).accepts_kernels:
        return False
    return geometry.weight_numel <= MAX_KEPT_SHARE * geometry.activations(x)


class _Call(NamedTuple):
    """The arguments that the operator, its backward and the fakes of both share, in the order of ``_SCHEMA``.

    ``torch.library`` takes tensors, numbers and lists of numbers, so a mixture and the arguments of the convolution are
    passed flat; it infers a schema only from a signature that is written out, so the schema is given as text. What
    cannot be shared: ``keep`` of the forward operator, ``grad``, ``kernels`` and ``needs`` of the backward one.
    """

    x: Tensor  # [B, I, H, W], padded already
    experts: Tensor  # [E, O, I/G, kh, kw]
    gate: Tensor | None
    spatial: Tensor | None
    in_scale: Tensor | None
    out_scale: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.gate, self.spatial, self.in_scale, self.out_scale)

    @property
    def arguments(self) -> ConvArguments:
        return ConvArguments(self.stride, self.padding, self.dilation, self.groups)


_TENSORS = 6
_SCHEMA = (
    "Tensor x, Tensor experts, Tensor? gate, Tensor? spatial, Tensor? in_scale, Tensor? out_scale, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
)


def forward_blockwise(*flat: Any) -> tuple[Tensor, Tensor]:
    """The operator's body: the arguments of ``_Call`` and ``keep``.

    Returns [B, O, H', W'], and the kernels [B, O, I/G, kh, kw] if backward needs them, else an empty tensor.
    """
    *shared, keep = flat
    call = _Call(*shared)
    x, experts, mixture, arguments = call.x, call.experts, call.mixture, call.arguments
    backend = backend_for(x, experts, mixture, arguments, with_kernels=keep)
    if not keep:
        return backend.convolve(x, experts, mixture, arguments), x.new_empty(0)
    kernels = mix_batch(experts, mixture, call.groups, x.shape[0], x.dtype)
    return backend.convolve(x, experts, mixture, arguments, kernels), kernels  # type: ignore[call-arg]


_forward = torch.library.custom_op(
    "condconv_surgery::convolve_blockwise",
    forward_blockwise,
    mutates_args=(),
    schema=f"({_SCHEMA}, bool keep) -> (Tensor, Tensor)",
)

OPERATOR = torch.ops.condconv_surgery.convolve_blockwise.default
"""What a dispatch mode sees of ``forward_blockwise``."""


@_forward.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    *shared, keep = flat
    call = _Call(*shared)
    kernels = call.x.new_empty((call.x.shape[0], *call.experts.shape[1:]) if keep else 0)
    return empty_output(call.x, call.experts, call.arguments), kernels


def _backward_body(grad: Tensor, kernels: Tensor, *flat: Any) -> list[Tensor]:
    *shared, needs = flat
    call = _Call(*shared)
    x, experts, mixture, arguments = call.x, call.experts, call.mixture, call.arguments
    kept = kernels.numel() > 0
    # the backend of forward, unless one was enabled or disabled since
    backend = backend_for(x, experts, mixture, arguments, with_kernels=kept)
    out = empty_gradients(x, experts, mixture)
    given = (grad, x, experts, mixture, arguments, out, needs, *((kernels,) if kept else ()))
    values = backend.backward(*given)
    return [_with_layout_of(promised, value) for value, promised in zip(values, out, strict=True)]


def _with_layout_of(promised: Tensor, value: Tensor | None) -> Tensor:
    """``value`` in the dtype and the strides of ``promised``, which the fake told a compiler."""
    if value is None or value is promised:
        return promised
    same = value.dtype == promised.dtype and value.stride() == promised.stride()
    return value if same else promised.copy_(value)


_backward = torch.library.custom_op(
    "condconv_surgery::convolve_blockwise_backward",
    _backward_body,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor kernels, {_SCHEMA}, bool[] needs) -> Tensor[]",
)


@_backward.register_fake
def _(grad: Tensor, kernels: Tensor, *flat: Any) -> list[Tensor]:
    call = _Call(*flat[:-1])
    return empty_gradients(call.x, call.experts, call.mixture)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]
) -> None:
    _, kernels = output
    ctx.mark_non_differentiable(kernels)
    ctx.save_for_backward(kernels, *inputs[:_TENSORS])  # type: ignore[arg-type]
    ctx.arguments = inputs[_TENSORS:-1]  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _of_kernels: Tensor | None
) -> tuple[Tensor | None, ...]:
    kernels, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    needs = list(ctx.needs_input_grad[:_TENSORS])  # type: ignore[attr-defined]
    if needs_recording(grad):
        arguments = ConvArguments(*ctx.arguments)  # type: ignore[attr-defined]
        return (*recorded_gradients(grad, tensors, arguments, needs), None, None, None, None, None)
    grads = _backward(grad, kernels, *tensors, *ctx.arguments, needs)  # type: ignore[attr-defined]
    needed = [g if n and t is not None else None for g, n, t in zip(grads, needs, tensors, strict=True)]
    return (*needed, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
