"""What torch needs to know of the operators of ``source/operators.cpp`` beside their code: fakes and derivatives.

With them ``torch.compile``, ``torch.export`` and profilers see each kernel as an operator of its own:
``condconv_surgery::cpp_convolve`` and the others that start with ``cpp_``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.geometry import ConvArguments
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_experts, unmix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import output_size
from condconv_surgery.ops.per_sample.second_order import needs_recording, recorded_gradients

NAMES = (
    "convolve",
    "convolve_without_autograd",
    "convolve_rounded",
    "input_gradient",
    "kernel_gradients",
    "depthwise_kernel_gradient",
    "pool",
    "sigmoid_gates",
    "attention",
    "sigmoid_layer",
    "attention_layer",
)
_TENSORS = 6  # of a convolution: x, the experts and the four parts of the mixture


def declare_operators() -> SimpleNamespace:
    """The operators by name, once their library is loaded."""
    for name in NAMES:
        torch.library.register_fake(_full(name), _FAKES[name])
    torch.library.register_autograd(_full("convolve"), _differentiate, setup_context=_save_for_backward)
    return SimpleNamespace(**{name: _operator(name) for name in NAMES})


def _full(name: str) -> str:
    return f"condconv_surgery::cpp_{name}"


def _operator(name: str) -> Any:
    return getattr(torch.ops.condconv_surgery, f"cpp_{name}").default


def _output(x: Tensor, experts: Tensor, arguments: ConvArguments) -> Tensor:
    return x.new_empty(x.shape[0], experts.shape[1], *output_size(x, experts.shape[3:], arguments))


def _convolved(x: Tensor, experts: Tensor, *rest: Any) -> Tensor:
    """Of an operator that ends with the arguments of a convolution."""
    return _output(x, experts, ConvArguments(*rest[-4:]))


def _convolved_by_values(x: Tensor, experts: Tensor, *rest: Any) -> Tensor:
    """Of an operator that ends with the same as single values."""
    sh, sw, ph, pw, dh, dw, groups = rest[-7:]
    return _output(x, experts, ConvArguments((sh, sw), (ph, pw), (dh, dw), groups))


def _like_kernels(grad: Tensor, x: Tensor, experts: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(part) for part in (experts, *rest[:4]) if part is not None]


_FAKES: dict[str, Any] = {
    "convolve": _convolved,
    "convolve_without_autograd": _convolved,
    "convolve_rounded": _convolved,
    "input_gradient": lambda grad, x, *rest: torch.empty_like(x),
    "kernel_gradients": _like_kernels,
    "depthwise_kernel_gradient": lambda grad, x, experts, *rest: x.new_empty(x.shape[0], *experts.shape[1:]),
    "pool": lambda x: x.new_empty(x.shape[:2]),
    "sigmoid_gates": lambda pooled, weight, bias, factor: pooled.new_empty(pooled.shape[0], weight.shape[0]),
    "attention": lambda pooled, reduce, norm, eps, relu, temperature, heads, present: [
        pooled.new_empty(pooled.shape[0], weight.shape[0]) for weight in heads[::2]
    ],
    "sigmoid_layer": _convolved_by_values,
    "attention_layer": _convolved_by_values,
}


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.arguments = inputs[_TENSORS:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs, arguments = list(ctx.needs_input_grad[:_TENSORS]), ConvArguments(*ctx.arguments)
    if needs_recording(grad):
        gradients = recorded_gradients(grad, ctx.saved_tensors, arguments, needs)
    else:
        x, experts, *parts = ctx.saved_tensors
        gradients = convolution_gradients(grad, x, experts, Mixture(*parts), arguments, needs)
    return (*gradients, None, None, None, None)


def convolution_gradients(
    grad: Tensor, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients of ``x``, the experts and the parts of the mixture, in this order.

    All tensors are contiguous and in float32, but for ``grad``. needs: which gradients are asked for; the others may be
    None.
    """
    grad, given = grad.contiguous(), (x, experts, *mixture, *arguments)
    gradients: list[Tensor | None] = [None] * _TENSORS
    if needs[0]:
        gradients[0] = _operator("input_gradient")(grad, *given)
    if not any(needs[1:]):
        return gradients
    depthwise = 1 < arguments.groups == x.shape[1] == experts.shape[1]
    if not depthwise:
        found = iter(_operator("kernel_gradients")(grad, *given))
        gradients[1:] = [None if part is None else next(found) for part in (experts, *mixture)]
    else:  # kernels are small: torch's operators do the rest
        to_kernels = _operator("depthwise_kernel_gradient")(grad, x, experts, *arguments)
        gradients[1] = torch.zeros_like(experts) if needs[1] else None
        mixed = mix_experts(experts, mixture.gate)
        gradients[2:] = unmix_kernels(to_kernels, mixed, experts, mixture, arguments.groups, gradients[1])
    return gradients
