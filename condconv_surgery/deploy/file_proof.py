"""Whether a model can be compared with its exported file, and how far the outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condconv_surgery.errors import ProofError, SurgeryError, listed, one_line
from condconv_surgery.surgery.copy_model import copy_of
from condconv_surgery.surgery.proof.output_tensors import output_tensors
from condconv_surgery.surgery.proof.rounding_error import fits_in_float64

TOLERANCE = 1e-4
"""Largest difference of a file from its model, relative to the magnitude of the outputs."""

ROUNDING_FACTOR = 4.0
"""A file so many times as far from the outputs in float64 as the model itself is no worse than it: the rounding errors
of two orders of the same sums differ by chance."""

MAX_ROUNDING = 1e-2
"""Where a model's own rounding is more than this share of its outputs, it explains nothing."""


@dataclass(frozen=True)
class FileProof:
    """How far a file is from its model.

    difference: the largest, relative to the largest output of its input. rounding: where ``difference`` is more than
    ``TOLERANCE`` because the model amplifies rounding: its own distance from its outputs in float64. doubt: that
    distance, where it is more than ``TOLERANCE`` and the file is further away than it explains.
    """

    difference: float
    rounding: float | None = None
    doubt: float | None = None

    @property
    def holds(self) -> bool:
        """The file computes what the model does."""
        return self.difference <= TOLERANCE or self.rounding is not None


@torch.no_grad()
def require_exportable(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs. Raises ``SurgeryError`` for a model, in eval mode, whose file could not be written or compared.

    images: a batch for it, [B, C, H, W].
    """
    try:
        outputs = output_tensors(model(images))
    except Exception as error:  # whatever a user's forward raises
        raise SurgeryError(
            f"The model cannot be called with images {list(images.shape)}: {one_line(error)}",
            "A network is exported whose one input is a batch of images [B, C, H, W].",
            f"another size= than {images.shape[-1]}, or a module around it whose forward takes the images alone",
        ) from error
    if not outputs:
        raise SurgeryError(
            "The model returns no tensor.", "A file has outputs.", "a module around it whose forward returns tensors"
        )
    if any(output.isnan().any() for output in outputs):
        bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
        raise SurgeryError(
            f"The outputs of the model are NaN{f': so are values of {listed(bad)}' if bad else ''}.",
            "No file can be compared with that.",
            "weights from before training diverged",
        )
    return outputs


def proven(prove: Callable[[], FileProof], dynamic_size: bool) -> FileProof:
    """What ``prove`` gives. Raises ``ProofError`` where the file does not compute what the model does, or does not run.

    dynamic_size: whether the file is for any height and width.
    """
    by_size = "dynamic_size=False (a graph cannot decide by the size), " if dynamic_size else ""
    advice = f"{by_size}another form=, or collapse"
    try:
        proof = prove()
    except (SurgeryError, OSError):
        raise
    except Exception as error:  # what a runtime raises is no class of its own
        raise ProofError(
            f"The exported file does not run in its runtime: {one_line(error)}",
            "It must take every batch and size that it is for. Nothing was written.",
            advice,
        ) from error
    if not proof.holds:
        doubt = "" if proof.doubt is None else f"; in float32 the model itself is {proof.doubt:.2g} off float64"
        raise ProofError(
            f"The exported file differs from the model by {proof.difference:.3g} of its outputs{doubt}.",
            f"At most {TOLERANCE:g} is allowed. Nothing was written.",
            advice,
        )
    return proof


@torch.no_grad()
def prove_outputs(model: nn.Module, actual: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor]) -> FileProof:
    """Compare the outputs of a file for each of ``inputs``, ``actual``, with those of ``model`` in eval mode.

    Where float32 leaves doubt, the model in float64 decides: a deep network can amplify rounding a millionfold.
    """
    expected = [output_tensors(model(images)) for images in inputs]
    difference = largest_gap(actual, expected)
    if difference <= TOLERANCE or not fits_in_float64(model):
        return FileProof(difference)
    try:
        wide = copy_of(model).double()
        exact = [output_tensors(wide(images.double())) for images in inputs]
    except Exception:  # whatever a user's forward raises: no float64, no doubt to settle
        return FileProof(difference)
    own = [largest_gap([theirs], [truth]) for theirs, truth in zip(expected, exact, strict=True)]
    limits = [max(TOLERANCE, ROUNDING_FACTOR * gap if gap <= MAX_ROUNDING else 0.0) for gap in own]
    gaps = [largest_gap([ours], [truth]) for ours, truth in zip(actual, exact, strict=True)]
    if all(gap <= limit for gap, limit in zip(gaps, limits, strict=True)):
        return FileProof(difference, max(own))
    return FileProof(difference, doubt=max(own) if max(own) > TOLERANCE else None)


def largest_gap(actual: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """The largest over all inputs and outputs, each relative to the largest finite output of its input.

    Infinite for other shapes, or where only one value is NaN.
    """
    gaps = [0.0]
    for outputs, wanted in zip(actual, expected, strict=True):
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in wanted]:
            return float("inf")
        gap = max(_gap(a.double(), b.double()) for a, b in zip(outputs, wanted, strict=True))
        magnitude = max(_largest(b.double().nan_to_num(0.0, 0.0, 0.0).abs()) for b in wanted)
        gaps.append(gap / magnitude if gap and magnitude else gap)
    return max(gaps)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; none between equal infinities, an infinite one where a value is NaN."""
    gap = (a - b).abs().masked_fill(a == b, 0.0)
    return _largest(gap.nan_to_num(float("inf"), float("inf")))


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
