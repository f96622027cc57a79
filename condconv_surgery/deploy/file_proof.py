"""Whether a model can be compared with its exported file, and how far the outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from condconv_surgery.errors import SurgeryError, listed, one_line
from condconv_surgery.surgery.proof.output_tensors import output_tensors

TOLERANCE = 1e-4
"""Largest difference of a file from its model, relative to the magnitude of the outputs."""


@torch.no_grad()
def require_exportable(model: nn.Module, images: Tensor) -> None:
    """Raise ``SurgeryError`` for a model, in eval mode, whose file could not be written or compared.

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


@torch.no_grad()
def largest_difference(model: nn.Module, actual: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor]) -> float:
    """The largest over all inputs and outputs, each relative to the largest finite output of its input.

    actual: the outputs of the file for each of ``inputs``. Infinite for other shapes, or where only one value is NaN.
    """
    return largest_gap(actual, [output_tensors(model(images)) for images in inputs])


def largest_gap(actual: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """``largest_difference`` from outputs at hand."""
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
