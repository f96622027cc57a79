"""Top-1 of an exported file on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.deploy.mean_mixtures import Labelled
from condconv_surgery.deploy.runtimes.runtime_protocol import Runtime


def top1_of_file(runtime: Runtime, path: Path, batches: Sequence[Labelled], batch: int | None) -> float:
    """Top-1, 0 to 1, over the labelled ones of ``batches``. batch: the only one that the file takes, or None."""
    pairs = [(images, labels) for images, labels in batches if labels is not None]
    inputs = [part for images, _ in pairs for part in in_batches(images, batch)]
    outputs = iter(runtime.run(path, inputs))
    correct = 0
    for images, labels in pairs:
        logits = torch.cat([next(outputs)[0] for _ in in_batches(images, batch)])
        correct += int((logits[: len(labels)].argmax(1) == labels).sum())
    return correct / sum(len(labels) for _, labels in pairs)


def in_batches(images: Tensor, batch: int | None) -> list[Tensor]:
    """``images`` [N, C, H, W] in batches of ``batch``, the last one filled up with zeros; all together for None."""
    if batch is None:
        return [images]
    missing = -len(images) % batch
    return list(torch.split(F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)), batch))
