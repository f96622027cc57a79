"""The batch dimension of a program that is exported."""

from __future__ import annotations

import torch

# torch 2.10 raises AssertionError("batch <= 2147483647/432") for a grouped convolution over an unbounded batch: it
# limits the input to 2**31 elements, and fails to print a limit of the batch that is no whole number
LARGEST = None if torch.__version__ >= torch.torch_version.TorchVersion("2.11") else 1024


def dynamic_batch(smallest: int | None = None) -> object:
    """``Dim("batch")``, unbounded where torch can."""
    return torch.export.Dim("batch", min=smallest, max=LARGEST)
