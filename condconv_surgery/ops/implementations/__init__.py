"""The table of implementations of a per-sample convolution: one file each, all the same function.

All but ``blockwise`` are compositions of torch's operators, which any tracer, exporter or second derivative can handle.
"""

from __future__ import annotations

from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.blockwise import Blockwise
from condconv_surgery.ops.implementations.bmm import Bmm
from condconv_surgery.ops.implementations.grouped import Grouped
from condconv_surgery.ops.implementations.implementation import Implementation
from condconv_surgery.ops.implementations.loop import Loop
from condconv_surgery.ops.implementations.mix_inputs import MixInputs
from condconv_surgery.ops.implementations.mix_outputs import MixOutputs
from condconv_surgery.ops.implementations.plain import Plain
from condconv_surgery.ops.implementations.static import Static
from condconv_surgery.ops.implementations.unfold import Unfold
from condconv_surgery.ops.mixture import Mixture

_ALL: tuple[Implementation, ...] = (
    Static(),
    Blockwise(),
    Grouped(),
    Unfold(),
    Plain(),
    Bmm(),
    MixOutputs(),
    MixInputs(),
    Loop(),
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in _ALL}
"""By name. Of equal estimates the first one is chosen."""


def why_not(name: str, batch: int, mixture: Mixture, geometry: ConvGeometry) -> str | None:
    """Why the implementation of this name cannot compute this layer on this batch, or None where it can."""
    if name not in IMPLEMENTATIONS:
        return "there is no such implementation"
    if batch == 0:
        return None if name == "static" else "an empty batch needs no kernels"
    return IMPLEMENTATIONS[name].why_not(batch, mixture, geometry)


def legal_implementations(batch: int, mixture: Mixture, geometry: ConvGeometry) -> list[str]:
    """The names of the implementations that can compute this layer on this batch."""
    return [name for name in IMPLEMENTATIONS if why_not(name, batch, mixture, geometry) is None]
