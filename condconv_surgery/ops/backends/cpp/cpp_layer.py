"""A whole layer by one operator of the compiled code: pool, route, mix, convolve, add the bias.

At batch 1 and on small maps the calls between these steps take longer than the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.ops.backends.cpp.cpp_convolution import in_format_of, reads
from condconv_surgery.ops.backends.cpp.cpp_eligibility import kernels_for
from condconv_surgery.ops.backends.cpp.cpp_routing import HEADS, attention_arguments
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.router_forms import GatedAttention, SigmoidGates, WholeForm
from condconv_surgery.ops.tracing_state import are_plain, linear_parts


def fast_layer(
    x: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    form: WholeForm,
    geometry: ConvGeometry,
    scales: Tensor | None = None,
) -> Tensor | None:
    """[B, I, H, W] -> [B, O, H', W'] by the mixture that ``form`` describes, or None where that is not possible.

    scales: [E, O], of experts in int8; those in bfloat16 have none.
    form: its one output is the gate, or its four outputs are in_scale, out_scale, spatial and gate.
    """
    code = kernels_for(x, experts, bias)
    if code is None or x.dim() != 4 or not x.numel() or not reads(x, experts, geometry):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    padded, arguments = geometry.pad(x)
    if padded is not x:  # the router pools what is not padded
        return None
    (sh, sw), (ph, pw), (dh, dw), groups = arguments
    values = sh, sw, ph, pw, dh, dw, groups  # lists take as long as a small layer
    given, x, y = x, x if x.is_contiguous() else x.contiguous(), None
    if isinstance(form, SigmoidGates):
        parts = linear_parts(form.linear)
        if parts is not None:
            y = code.sigmoid_layer(x, experts, scales, bias, *parts, form.factor, *values)
        return None if y is None else in_format_of(given, y)
    attention, gates = form if isinstance(form, GatedAttention) else (form, None)
    if len(attention.heads) in (1, HEADS) and are_plain(attention.temperature):
        if x.shape[0] > 1 and gates is None and attention.heads[-1] is None and attention.heads[-2] is None:
            return None  # scales alone may be cheaper on the activations
        routed = attention_arguments(attention)
        of_gates = (None, None) if gates is None else linear_parts(gates.linear)
        if routed is not None and of_gates is not None:
            factor = 0.0 if gates is None else gates.factor
            y = code.attention_layer(x, experts, scales, bias, *routed, *of_gates, factor, *values)
    return None if y is None else in_format_of(given, y)
