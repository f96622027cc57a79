"""The forms of a conditional layer in an exported graph, all the same function.

form      what the graph holds                                                    possible for
scale     one static convolution, inputs and outputs scaled for each channel      one expert without spatial attention
sum       static convolutions of all experts, outputs gated and added             gates without spatial attention
taps      1x1 convolutions for each kernel position, scaled by the attention      spatial attention
matmul    kernels mixed; 1x1 as a batched MatMul, k x k as unfold and MatMul      kernels that differ between images
loop      kernels mixed; a loop over the images, a convolution for each           every layer
kernel    the kernel mixed, one convolution                                       a batch of 1; any in an image loop
grouped   kernels mixed, one convolution with a group for each image              a fixed batch; kernels that differ

``scale``, ``sum`` and ``taps`` have constant kernels only: mobile runtimes and INT8 need that. An image loop: the whole
graph for one image, in a loop over those of the batch (``runtimes.onnx_scan``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from condconv_surgery.deploy.mean_mixtures import mixture_of_zeros
from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.layers import ConditionalConv2d, routers
from condconv_surgery.layers.find_layers import named_layers, routed_layers
from condconv_surgery.ops.implementations import why_not
from condconv_surgery.ops.mixture import Mixture, same_kernel_for_all

CONSTANT = ("scale", "sum", "taps")
"""The forms in which every kernel is a constant."""

IMPLEMENTATIONS_OF = {"matmul": ("bmm", "unfold"), "loop": ("loop",), "kernel": ("plain",), "grouped": ("grouped",)}
"""The implementations (``ops.implementations``) of the other forms, of which the first possible one is taken."""

FORMS = (*CONSTANT, *IMPLEMENTATIONS_OF)

INSTEAD = {"sum": ("scale",), "taps": ("sum", "scale"), "matmul": ("scale",), "grouped": ("scale",)}
"""What a layer has that is simpler than the wanted form: it has one kernel, or no attention over positions."""


@dataclass(frozen=True)
class LayerCase:
    """What decides the form of a layer: itself, a mixture of its router, the batch of the graph (None for any)."""

    layer: ConditionalConv2d[Any]
    mixture: Mixture
    batch: int | None

    def why_not(self, form: str) -> str | None:
        """Why the layer cannot have this form; None where it can."""
        mixture, standardised = self.mixture, self.layer.standardisation is not None
        if form == "scale":
            return None if same_kernel_for_all(mixture) else "each image has its own kernel"
        if form in CONSTANT and standardised:
            return "its mixed kernel is standardised"
        if form == "taps":
            return "it has no attention over kernel positions" if mixture.spatial is None else None
        if form == "sum":
            return _why_not_sum(mixture)
        if form == "kernel" and self.batch != 1:
            return "its graph computes one image at a time"
        if form == "grouped" and self.batch is None:
            return "its number of groups is the batch, which must be fixed"
        reasons = [why_not(own, self.batch or 2, mixture, self.layer.geometry) for own in IMPLEMENTATIONS_OF[form]]
        return None if None in reasons else reasons[-1]

    def implementation(self, form: str) -> str:
        """The implementation of a possible form with mixed kernels."""
        names = IMPLEMENTATIONS_OF[form]
        return next(own for own in names if why_not(own, self.batch or 2, self.mixture, self.layer.geometry) is None)


def _why_not_sum(mixture: Mixture) -> str | None:
    if mixture.spatial is not None:
        return "outputs cannot be added by kernel position"
    return "it has one kernel" if mixture.gate is None else None


def layer_cases(model: nn.Module, batch: int | None) -> dict[str, LayerCase]:
    """The case of each conditional layer, by its first name."""
    mixtures = {name: mixture_of_zeros(router) for name, router in routers(model).items()}
    of_layer = {id(layer): mixtures[name] for name, layers in routed_layers(model).items() for layer in layers}
    layers = named_layers(model, ConditionalConv2d)
    return {names[0]: LayerCase(layer, of_layer[id(layer)], batch) for names, layer in layers}


def choose_forms(cases: Mapping[str, LayerCase], form: str, preferred: Sequence[str]) -> dict[str, str]:
    """The form of each layer by its name.

    form: for all layers (``INSTEAD`` where a layer is simpler), or ``"auto"``: for each the first possible one of
        ``preferred``, the forms that a runtime takes, best first for a dense k x k kernel (``_order`` for others).
        Where some layer must compute its kernel, ``kernel`` comes first for all: a runtime keeps static convolutions in
        a layout of its own, and changes of the layout cost more than these save.
    Raises ``InputError`` for an unknown form, or one that the runtime or some layer cannot have.
    """
    if form not in ("auto", *FORMS):
        raise unknown_name("form", form, ["auto", *FORMS], 'form="auto"')
    if form not in ("auto", *preferred):
        raise InputError(f'form="{form}" is not for this runtime.', f"It takes: {', '.join(preferred)}.", 'form="auto"')
    if "kernel" in preferred and any(case.why_not("scale") for case in cases.values()):
        preferred = ("kernel", *(own for own in preferred if own != "kernel"))
    return {name: _form(name, case, form, preferred) for name, case in cases.items()}


def _form(name: str, case: LayerCase, form: str, preferred: Sequence[str]) -> str:
    possible = [own for own in _order(case, preferred) if case.why_not(own) is None]
    wanted = [own for own in (form, *INSTEAD.get(form, ())) if own in possible]
    if wanted:
        return wanted[0]
    if form == "auto" and possible:
        return possible[0]
    reason = case.why_not(preferred[-1] if form == "auto" else form)
    raise InputError(
        f'{name} cannot have form="{form}": {reason}.',
        f"Possible for it: {', '.join(possible) or 'no form of this runtime'}.",
        _advice(case, form) if possible else "collapse, or convert without this layer",
    )


def _order(case: LayerCase, preferred: Sequence[str]) -> Sequence[str]:
    """``preferred``, but of dense k x k kernels a static convolution first, of 1x1 ones a matrix product before a loop.

    A runtime arranges a constant kernel once; a dense one that comes with each image takes half as long again.
    """
    geometry = case.layer.geometry
    if not geometry.pointwise and not geometry.depthwise and "scale" in preferred:
        return ["scale", *(own for own in preferred if own != "scale")]
    if geometry.pointwise and "loop" in preferred:
        return [*(own for own in preferred if own != "loop"), "loop"]
    return preferred


def _advice(case: LayerCase, form: str) -> str:
    if form == "kernel" and case.batch != 1:
        return "batch=1"
    if form == "grouped" and case.batch is None:
        return "batch=8"
    return 'form="auto", which chooses for each layer'
