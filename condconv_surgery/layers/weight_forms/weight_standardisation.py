"""Weight standardisation (Qiao et al. 2019, arXiv:1903.10520; scaled: Brock et al. 2021, arXiv:2101.08692).

A plain layer convolves, for each filter o of n = I/G * kh * kw weights, with

    s_o * (W_o - mean(W_o)) / sqrt(var(W_o) + eps),    s_o = scale * gain_o, or 1

so training changes only the direction of a filter. In a conditional layer the *mixed* kernel of each sample is
standardised:

    K_b,o = s_o * M_b,o / sqrt(mean(M_b,o ** 2) + eps),    M_b = sum_e gate[b,e] * (V_e - mean(V_e))

Standardising each expert instead is equal to that only while the experts are equal. The norm of a mixture follows from
the inner products of the centred experts, ``C_e = V_e - mean(V_e)``,

    mean(M_b,o ** 2) = sum_ef gate[b,e] gate[b,f] <C_e,o, C_f,o> / n

so it becomes a scale of each sample's outputs, and no mixed kernel is read twice.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from condconv_surgery.layers.conv2d_subclasses import is_standardised
from condconv_surgery.ops.autocast import is_autocast_on
from condconv_surgery.ops.mixture import Mixture


class WeightStandardisation(nn.Module):
    """Changes experts and mixture such that the mixed kernel of each sample is standardised.

    eps: added to the variance. scale: a factor of every kernel. gain: [O], learned, or None for ones.
    """

    def __init__(self, eps: float, scale: float = 1.0, gain: Tensor | None = None) -> None:
        super().__init__()
        self.eps, self.scale = eps, scale
        self.gain = None if gain is None else nn.Parameter(gain)

    def forward(self, experts: Tensor, mixture: Mixture) -> tuple[Tensor, Mixture]:
        """experts: [E, O, I/G, kh, kw]. mixture: of B samples. Returns both as ``conditional_conv2d`` takes them."""
        centred = experts - experts.mean((2, 3, 4), keepdim=True)
        flat = centred.flatten(2)  # [E, O, n]
        gate = mixture.gate
        with torch.autocast(experts.device.type, enabled=False) if is_autocast_on(experts) else nullcontext():
            if gate is None:
                norms = self._inverse_norm(flat.square().mean(2))  # [1, O]
                return centred * norms[:, :, None, None, None], mixture
            by_filter = flat.transpose(0, 1)  # [O, E, n]
            products = by_filter @ by_filter.transpose(1, 2) / flat.shape[2]  # [O, E, E]
            gate = gate.to(experts.dtype)
            count, filters = experts.shape[:2]
            half = (gate @ products.transpose(0, 1).reshape(count, -1)).view(-1, filters, count)  # [B, O, E]
            norms = self._inverse_norm((half * gate[:, None]).sum(2))  # [B, O]
        return centred, mixture._replace(
            out_scale=norms if mixture.out_scale is None else mixture.out_scale * norms.to(mixture.out_scale.dtype)
        )

    def _inverse_norm(self, variance: Tensor) -> Tensor:
        """``s_o / sqrt(variance + eps)``: [..., O] -> [..., O]."""
        factor = self.scale * (variance.clamp_min(0.0) + self.eps).rsqrt()
        return factor if self.gain is None else factor * self.gain.view(-1)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, scale={self.scale:.6g}, gain={self.gain is not None}"


def standardisation_of(module: nn.Module) -> WeightStandardisation | None:
    """The standardisation of a layer of timm, with a copy of its gain; ``None`` for any other layer."""
    if not is_standardised(module):
        return None
    gain = getattr(module, "gain", None)
    if gain is None:
        return WeightStandardisation(module.eps)  # type: ignore[arg-type]
    return WeightStandardisation(module.eps, module.scale, gain.detach().clone().view(-1))  # type: ignore[arg-type]
