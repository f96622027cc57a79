"""Predict the MACs that other counters print for a model."""

from __future__ import annotations

from condconv_surgery.reporting.measure.cost_table import Profile

NORM = {"fvcore": 2, "ptflops": 2, "thop": 4}
"""What each counter adds per value that passes through batch norm."""


def predicted(profile: Profile) -> dict[str, int]:
    """MACs that each counter prints for the model, within a few percent.

        torchinfo = total - (convolution + mixing + attention) of the conditional layers
        thop      = torchinfo + 4 x values in batch norms
        fvcore    = total + 2 x values in batch norms
        ptflops   = total - convolution of the conditional layers + 2 x values in batch norms

    torchinfo and thop look up the class of a module and do not know ours: they see only the ``nn.Linear`` of a router.
    ptflops (its default backend) patches functions of torch and sees the product that mixes kernels, not the operator
    that convolves. It is left out for layers with attention, because it also counts multiplications by scales.
    """
    conditional = [layer.macs for layer in profile.layers if layer.conditional]
    total = profile.macs.total
    norms = sum(layer.activation_values for layer in profile.layers if layer.kind.startswith("BatchNorm"))
    visible = total - sum(macs.convolution + macs.mixing + macs.attention for macs in conditional)
    counted = {
        "torchinfo": visible,
        "thop": visible + NORM["thop"] * norms,
        "fvcore": total + NORM["fvcore"] * norms,
    }
    if not any(macs.attention for macs in conditional):
        counted["ptflops"] = total - sum(macs.convolution for macs in conditional) + NORM["ptflops"] * norms
    return counted
