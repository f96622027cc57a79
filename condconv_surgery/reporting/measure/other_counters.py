"""What other counters print for a model, and why: they look at other things."""

from __future__ import annotations

from condconv_surgery.reporting.measure.model_profile import Profile
from condconv_surgery.reporting.render.number_format import human

NORM = {"fvcore": 2, "ptflops": 2, "thop": 4}
"""What each adds for a value that goes through batch norm."""


def predicted(profile: Profile) -> dict[str, int]:
    """MACs that each counter prints for the model, about: within a few percent, as they count this and that beside.

        torchinfo = total - (convolution + mixing + attention) of the conditional layers
        thop      = torchinfo + 4 x values in batch norms
        fvcore    = total + 2 x values in batch norms
        ptflops   = total - convolution of the conditional layers + 2 x values in batch norms

    torchinfo and thop go by the class of a module and know none of ours: they see the plain ``nn.Linear`` of a router.
    ptflops (its default backend) replaces functions of torch and sees the product that mixes kernels, not the operator
    that convolves; it is left out for layers with attention, whose multiplications by scales it counts too.
    """
    conditional = [layer.macs for layer in profile.layers if layer.conditional]
    total = profile.macs.total
    norms = sum(layer.activation_values for layer in profile.layers if layer.kind.startswith("BatchNorm"))
    seen = total - sum(macs.convolution + macs.mixing + macs.attention for macs in conditional)
    found = {"torchinfo": seen, "thop": seen + NORM["thop"] * norms, "fvcore": total + NORM["fvcore"] * norms}
    if not any(macs.attention for macs in conditional):
        found["ptflops"] = total - sum(macs.convolution for macs in conditional) + NORM["ptflops"] * norms
    return found


def other_counters(profile: Profile) -> str:
    """Why other counters print other numbers, and which, in a sentence or two."""
    number = {name: human(macs) for name, macs in predicted(profile).items()}
    fvcore = f"fvcore about {number['fvcore']} (adds batch norm)"
    if not profile.converted:
        return (
            f"Other counters differ by what they add: {fvcore}, thop {number['thop']}, "
            f"torchinfo {number['torchinfo']}; torch's FlopCounterMode prints FLOPs, twice our MACs."
        )
    ptflops = f", ptflops {number['ptflops']} (misses the convolution)" if "ptflops" in number else ""
    return (
        "Other counters go by the class of a module and see of a conditional layer only its router: "
        f"torchinfo about {number['torchinfo']} MACs, thop {number['thop']}{ptflops}. "
        f"Right on these layers: torch's FlopCounterMode (FLOPs, twice our MACs) and {fvcore}."
    )
