"""Find the first module whose output is NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.training.distributed.fsdp import full_tensor

WEIGHTS = "the weights "
"""How the description of a weight begins."""


def first_nonfinite(
    model: nn.Module,
    batches: Sequence[Tensor],
    cast: Callable[[], AbstractContextManager[object]] = nullcontext,
    seed: int = 0,
) -> str | None:
    """Description of the first value that is not finite: the images, a weight or a module's output; ``None``: no such.

    Runs ``model`` on each batch of images once more, in its current mode, from the given seed of torch's generators.
    The model is left as it was.
    """
    if not all(_finite(images) for images in batches):
        return "the images themselves"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"{WEIGHTS}{name}"
    nonfinite: list[str] = []

    def check(name: str, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and not _finite(output):
            nonfinite.append(f"the output of {name} ({type(module).__name__})")

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(check, name)))
        with preserving_state(model), torch.no_grad(), cast():
            torch.manual_seed(seed)
            for images in batches:
                model(images)
    # Hooks of inner modules run before those of outer ones, so the first is the innermost.
    return nonfinite[0] if nonfinite else None


def first_nonfinite_gradient(model: nn.Module) -> str:
    """Description of the last parameter (the first in the backward pass) whose gradient is not finite."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name}"
    return "the norm of the whole gradient"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(full_tensor(tensor)).all())
