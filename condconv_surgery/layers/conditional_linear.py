"""A conditional ``nn.Linear``, as a 1x1 convolution (the classifier of CondConv's mobile models)."""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.errors import InputError
from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.ops.graph_node import as_node, is_traced
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.tracing_state import is_jit_traced
from condconv_surgery.recipe import Variant


class ConditionalLinear(ConditionalConv2d[Variant]):
    """A drop-in for ``nn.Linear`` with several weights, mixed for each sample.

    Shapes: [I] -> [O], or [B, *, I] -> [B, *, O]; the router takes the mean over ``*``. ``weight`` is [E, O, I, 1, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variant: Variant,
    ) -> None:
        super().__init__(in_features, out_features, 1, bias=bias, device=device, dtype=dtype, variant=variant)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, input: Tensor, mixture: Mixture | None = None) -> Tensor:
        if is_traced(input):
            node: Tensor = as_node(self, input) if mixture is None else as_node(self, input, mixture)
            return node
        if input.dim() == 1:
            return self.forward(input.unsqueeze(0), mixture).squeeze(0)
        if not is_jit_traced() and input.shape[-1] != self.in_features:
            raise InputError(
                f"{type(self).__name__} was given an input of shape {tuple(input.shape)}.",
                f"Its last dimension must be {self.in_features}.",
            )
        self._require_floats(input)
        flat = input.unsqueeze(1) if input.dim() == 2 else input.flatten(1, -2)  # [B, N, I]
        tokens = flat.transpose(1, 2).unsqueeze(-1)  # [B, I, N, 1]
        mixture = self.route(tokens) if mixture is None else mixture
        y = self.convolve(tokens, mixture)
        return y.squeeze(-1).transpose(1, 2).reshape(*input.shape[:-1], self.out_features)
