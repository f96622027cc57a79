"""The forms of a conditional layer in an exported graph, all the same function.

form      what the graph holds                                                    possible for
scale     one static convolution, inputs and outputs scaled for each channel      one expert without spatial attention
sum       static convolutions of all experts, outputs gated and added             gates without spatial attention
taps      1x1 convolutions for each kernel position, scaled by the attention      spatial attention
matmul    kernels mixed; 1x1 as a batched MatMul, k x k as unfold and MatMul      kernels that differ between images
loop      kernels mixed; a loop over the images, a convolution for each           every layer
kernel    the kernel mixed, one convolution                                       a batch of 1
grouped   kernels mixed, one convolution with a group for each image              a fixed batch; kernels that differ

``scale``, ``sum`` and ``taps`` have constant kernels only: mobile runtimes and INT8 need that.
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
    Raises ``InputError`` for an unknown form, or one that the runtime or some layer cannot have.
    """
    if form not in ("auto", *FORMS):
        raise unknown_name("form", form, ["auto", *FORMS], 'form="auto"')
    if form not in ("auto", *preferred):
        raise InputError(f'form="{form}" is not for this runtime.', f"It takes: {', '.join(preferred)}.", 'form="auto"')
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
    """``preferred``, and where a runtime takes loops what is faster than one for this geometry.

    In ONNX Runtime one depthwise convolution with a computed kernel takes longer than four with constant ones; for more
    images their sums cost more than the loop.
    """
    if "loop" not in preferred:
        return preferred
    geometry = case.layer.geometry
    first: tuple[str, ...] = ()
    if geometry.pointwise:
        first = ("scale", "kernel", "matmul")
    elif geometry.depthwise and case.batch == 1:
        first = ("scale", "sum")
    return [*first, *(own for own in preferred if own not in first)]


def _advice(case: LayerCase, form: str) -> str:
    if form == "kernel" and case.batch != 1:
        return "batch=1"
    if form == "grouped" and case.batch is None:
        return "batch=8"
    return 'form="auto", which chooses for each layer'
