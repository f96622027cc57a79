"""Mix the kernels of a few samples, ``K_b = out_b * in_b * spatial_b * sum_e gate[b,e] * experts[e]``, and gradients.

Both directions are written without autograd, so that no kernel is saved from forward to backward. Everything is one
pass over the kernels where possible: at a small map they are larger than the activations, and memory traffic limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.per_sample_conv import format_of
from condconv_surgery.ops.tracing_state import is_jit_traced, is_transformed


def mix_kernels(experts: Tensor, mixture: Mixture, groups: int = 1, out: Tensor | None = None) -> Tensor:
    """``K_b`` with every part of the mixture that is not None: [E, O, I/G, kh, kw] -> [B, O, I/G, kh, kw].

    A new tensor, or ``out`` if it is given and there is a gate; the expert itself, [1, O, I/G, kh, kw], when the
    mixture is empty.
    """
    kernels = mix_experts(experts, mixture.gate, out)
    # in place where autograd records nothing: these kernels are in the cache, and a second buffer would not be
    in_place = kernels is not experts and not torch.is_grad_enabled() and not (is_jit_traced() or is_transformed())
    return scale_kernels(kernels, mixture, groups, kernels if in_place else None)


def mix_experts(experts: Tensor, gate: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``sum_e gate[b,e] * experts[e]``: [E, O, I/G, kh, kw] -> [B, O, I/G, kh, kw]; the experts without a gate.

    out: a buffer of that shape for the result.
    """
    if gate is None:
        return experts
    rows = None if out is None else out.view(-1, experts[0].numel())
    return torch.mm(gate.to(experts.dtype), experts.flatten(1), out=rows).view(-1, *experts.shape[1:])


def mix_batch(
    experts: Tensor, mixture: Mixture, groups: int, batch: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """``mix_kernels`` without autograd, in ``dtype``, expanded to ``batch`` samples where they share one kernel."""
    with torch.no_grad():
        return mix_kernels(experts, mixture, groups, out).to(dtype).expand(batch, -1, -1, -1, -1)


def scale_kernels(kernels: Tensor, mixture: Mixture, groups: int, out: Tensor | None = None) -> Tensor:
    """``kernels`` [B, O, I/G, kh, kw] times every scale of the mixture; ``kernels`` itself when it has none.

    out: a buffer of that shape for the result, which may be ``kernels``; only where autograd records nothing.
    """
    shape = kernels.shape[1:]
    rows = shape[0] // groups
    columns = _columns(mixture, groups, shape[1], shape[2:].numel(), kernels)
    scales = [] if columns is None else [columns.unsqueeze(2)]
    if mixture.out_scale is not None:
        scales.append(mixture.out_scale.to(kernels.dtype).view(-1, groups, rows, 1))
    for scale in scales:  # each to broadcast with [B, G, O/G, I/G * kh * kw]
        target = None if out is None else out.view(-1, groups, rows, shape[1:].numel())
        kernels = torch.mul(kernels.view(-1, groups, rows, shape[1:].numel()), scale, out=target).view(-1, *shape)
    return kernels


def _columns(mixture: Mixture, groups: int, per_group: int, area: int, like: Tensor) -> Tensor | None:
    """``in_scale (x) spatial``, which multiplies the columns of every filter: [B, G, I/G * kh * kw] or None.

    It is materialised, since a product that broadcasts over 3x3 positions is not vectorised.
    """
    columns = None
    if mixture.in_scale is not None:
        columns = mixture.in_scale.to(like.dtype).view(-1, groups, per_group, 1).expand(-1, -1, -1, area)
    if mixture.spatial is not None:
        spatial = mixture.spatial.to(like.dtype).view(-1, 1, 1, area).expand(-1, groups, per_group, -1)
        columns = spatial if columns is None else columns * spatial
    return None if columns is None else columns.reshape(-1, groups, per_group * area)


def unmix_kernels(
    grad: Tensor, mixed: Tensor, experts: Tensor, mixture: Mixture, groups: int, grad_experts: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the parts of ``mixture`` from the gradient of ``K``; that of the experts is added in place.

    grad: [B, O, I/G, kh, kw], overwritten. mixed: the result of ``mix_experts``, overwritten unless it is the expert.
    grad_experts: [E, O, I/G, kh, kw] or None. Nothing is divided by a scale, which may be 0.
    """
    gate = mixture.gate
    scales = _unscale(grad, mixed, mixture, groups, in_place=gate is not None)
    flat, flat_experts = grad.view(grad.shape[0], -1), experts.flatten(1)  # [B, |W|], [E, |W|]
    if grad_experts is not None:
        if gate is None:
            grad_experts.view(1, -1).add_(flat.sum(0))
        else:
            grad_experts.view(len(experts), -1).addmm_(gate.to(grad.dtype).t(), flat)
    return [None if gate is None else flat @ flat_experts.t(), *scales]


def _unscale(
    grad: Tensor, mixed: Tensor, mixture: Mixture, groups: int, in_place: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the scales; ``grad`` becomes, in place, that of ``mixed``."""
    _, spatial, in_scale, out_scale = mixture
    if spatial is None and in_scale is None and out_scale is None:
        return None, None, None
    batch, (out, per_group, kh, kw) = grad.shape[0], mixed.shape[1:]
    rows, area = out // groups, kh * kw
    by_in = None if in_scale is None else in_scale.to(grad.dtype).reshape(batch, groups, per_group, 1)
    by_out = None if out_scale is None else out_scale.to(grad.dtype).reshape(batch * groups, rows, 1)
    by_area = None if spatial is None else spatial.to(grad.dtype).reshape(batch, 1, 1, area)
    grad = grad.view(batch * groups, rows, per_group * area)

    product = (mixed.mul_(grad.view_as(mixed)) if in_place else grad.view(batch, *mixed.shape[1:]) * mixed).view_as(
        grad
    )
    columns = _columns(mixture, groups, per_group, area, grad)
    if columns is None:
        columns = grad.new_ones(batch, groups, per_group * area)
    columns = columns.reshape(batch * groups, 1, per_group * area)
    sums = product.sum(1) if by_out is None else (by_out.transpose(1, 2) @ product).squeeze(1)
    sums = sums.view(batch, groups, per_group, area)  # summed over filters
    grads = (
        None if spatial is None else (sums if by_in is None else sums * by_in).sum((1, 2)).view(batch, kh, kw),
        None if in_scale is None else (sums if by_area is None else sums * by_area).sum(3).view(batch, -1),
        None if out_scale is None else (product @ columns.transpose(1, 2)).view(batch, out),
    )
    grad.mul_(columns)
    if by_out is not None:
        grad.mul_(by_out)
    return grads


def empty_gradients(x: Tensor, experts: Tensor, mixture: Mixture) -> list[Tensor]:
    """Uninitialised gradients of ``x``, the experts and the parts of ``mixture``; empty for parts that are None."""
    parts = [x.new_empty(0) if part is None else torch.empty_like(part) for part in mixture]
    return [torch.empty_like(x, memory_format=format_of(x)), torch.empty_like(experts), *parts]
