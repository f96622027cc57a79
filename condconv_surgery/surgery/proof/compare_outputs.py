"""The proof: original and converted model on the same input, in eval and in train mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError, ProofError, one_line
from condconv_surgery.runtime.meta_device import on_device
from condconv_surgery.runtime.model_call import call
from condconv_surgery.runtime.modes import device_of, in_mode, without_gradients
from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.surgery.proof.output_tensors import output_tensors

HALF = (torch.float16, torch.bfloat16, torch.complex32)

TRAIN_FACTOR = 10.0
"""Batch statistics divide by small numbers and so amplify rounding: train mode is allowed this much more."""


@dataclass(frozen=True)
class Gap:
    """The largest difference over all outputs.

    absolute: in the output's own units. relative: divided by the largest magnitude of the original's outputs.
    agreement: the share of samples whose largest output is at the same place (top-1), of the first [B, C] output of
    floating point.
    """

    absolute: float
    relative: float
    agreement: float | None = None


@dataclass(frozen=True)
class Difference:
    """Both modes; ``None`` where the original does not run in that mode, or returns no element, on the example."""

    eval: Gap | None
    train: Gap | None


@dataclass(frozen=True)
class Outputs:
    """All tensors that a model returned, in each mode, on the CPU.

    kind: the class of what it returned. half: layers to be compared compute in half precision, whatever the dtype of
    the model's outputs.
    """

    eval: list[Tensor] | None
    train: list[Tensor] | None
    kind: str = ""
    half: bool = False


def run_both_modes(model: nn.Module, arguments: tuple[Any, ...], modes: Sequence[bool] = (False, True)) -> Outputs:
    """Run ``model`` in eval and in train mode; its state is as before afterwards.

    The random state is the same at the start of each run, so dropout draws the same masks for both models.
    """
    results: dict[bool, list[Tensor] | None] = {False: None, True: None}
    kind = ""
    for training in modes:
        with in_mode(model, training), preserving_state(model), without_gradients(model):
            output = call(model, on_device(arguments, device_of(model)))
            kind = type(output).__name__
            # copied here: an output may be a buffer, whose values are about to be restored
            results[training] = [tensor.detach().to("cpu", copy=True) for tensor in output_tensors(output)]
    return Outputs(results[False], results[True], kind)


def require_tensors(before: Outputs) -> tuple[str, ...]:
    """A note for each mode in which nothing, or not all, of what the original returned can be compared.

    Raises ``InputError`` where no mode returned a tensor: such a model cannot be proven.
    """
    if not (before.eval or before.train):
        raise InputError(
            f"The model returns a {before.kind} without a tensor: nothing would be compared.",
            "The proof compares tensors and arrays in lists, tuples, dicts and the attributes of objects.",
            "a forward that returns its tensors, or convert(..., prove=False)",
        )
    notes = []
    for mode, outputs in (("eval", before.eval), ("train", before.train)):
        if _is_empty(outputs):
            notes.append(f"nothing compared in {mode} mode: the outputs are empty")
        share = _nonfinite_share(outputs or [])
        if share:
            notes.append(f"{share:.0%} of the original's outputs in {mode} mode are NaN or infinite: no proof of these")
    return tuple(notes)


def compare_with(model: nn.Module, arguments: tuple[Any, ...], modes: Sequence[bool], before: Outputs) -> Difference:
    """The gap between the outputs of the original and those of the converted ``model``.

    Raises ``ProofError`` when it does not run.
    """
    try:
        after = run_both_modes(model, arguments, modes)
    except Exception as error:  # a parent that reads its child's weight, say
        raise ProofError(
            f"The converted model does not run: {one_line(error)}",
            "It must take whatever the original takes.",
            "exclude= the layer that the traceback names (it is the cause of this error)",
        ) from error
    return compare(before, after)


def compare(before: Outputs, after: Outputs) -> Difference:
    """The gap between two models' outputs in each mode."""
    return Difference(_gap(before.eval, after.eval), _gap(before.train, after.train))


def exceeds(difference: Difference, before: Outputs, tolerance: float | None) -> bool:
    """A difference is past the tolerance in some mode."""
    return any(not gap.absolute <= limit for _, gap, limit, _ in _limits(difference, before, tolerance))


def require_within(
    difference: Difference, before: Outputs, tolerance: float | None, shown_as: Difference | None = None
) -> None:
    """Raise ``ProofError`` when a difference is past the tolerance (absolute; see ``allowed``).

    shown_as: the difference to name in the error, when this one stands for another (the same in float64).
    """
    for name, gap, limit, outputs in _limits(difference, before, tolerance):
        if gap.absolute <= limit:
            continue
        shown = getattr(shown_as, name, None) or gap
        rounding = f"tolerance={shown.absolute * 2:.1g} if that is rounding, or "
        raise ProofError(
            f"The converted model differs from the original by {shown.absolute:.3g} in {name} mode.",
            f"At most {limit:.3g} is allowed (outputs reach {_magnitude(outputs):.3g}).",
            f"{rounding if shown.absolute < math.inf else ''}exclude= the layers at fault",
        )


def _limits(
    difference: Difference, before: Outputs, tolerance: float | None
) -> list[tuple[str, Gap, float, list[Tensor]]]:
    rows = []
    for name, gap, outputs in (("eval", difference.eval, before.eval), ("train", difference.train, before.train)):
        if gap is not None and outputs is not None:
            limit = allowed(outputs, tolerance, before.half) * (TRAIN_FACTOR if name == "train" else 1.0)
            rows.append((name, gap, limit, outputs))
    return rows


def allowed(outputs: Sequence[Tensor], tolerance: float | None, half: bool = False) -> float:
    """``tolerance``, else ``1e-4`` of the outputs' magnitude in float32, ``5e-2`` in half precision.

    half: layers compute in half precision, whatever the dtype of the outputs.
    """
    if tolerance is not None:
        return tolerance
    share = 5e-2 if half or any(t.dtype in HALF for t in outputs) else 1e-4
    return share * _magnitude(outputs)


def _gap(before: list[Tensor] | None, after: list[Tensor] | None) -> Gap | None:
    if before is None or after is None:
        return None
    if [t.shape for t in before] != [t.shape for t in after]:
        return Gap(math.inf, math.inf, 0.0)
    if _is_empty(before):
        return None
    pairs = list(zip(before, after, strict=True))
    absolute = max(_largest(a, b) for a, b in pairs)
    matrices = [(a, b) for a, b in pairs if a.dim() == 2 and a.numel()]
    logits = [(a, b) for a, b in matrices if a.is_floating_point() and b.is_floating_point()]
    agreement = float((logits[0][0].argmax(1) == logits[0][1].argmax(1)).float().mean()) if logits else None
    return Gap(absolute, absolute / max(_magnitude(before), 1e-30), agreement)


def _largest(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    same = (a == b) | (a.isnan() & b.isnan())  # equal infinities and NaN are no difference
    gap = float((_wide(a) - _wide(b)).abs().masked_fill(same, 0.0).max())
    return math.inf if math.isnan(gap) else gap


def _magnitude(outputs: Sequence[Tensor]) -> float:
    return max((float(_wide(t).abs().nan_to_num(posinf=0.0).max()) for t in outputs if t.numel()), default=0.0)


def _nonfinite_share(outputs: Sequence[Tensor]) -> float:
    count = sum(int((~tensor.isfinite()).sum()) for tensor in outputs)
    return count / max(sum(tensor.numel() for tensor in outputs), 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _is_empty(outputs: list[Tensor] | None) -> bool:
    """The model ran, and returned no element."""
    return outputs is not None and not any(tensor.numel() for tensor in outputs)
