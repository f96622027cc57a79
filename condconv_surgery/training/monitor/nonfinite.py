"""Where a number that is none came from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from condconv_surgery.training.distributed.fsdp import whole


def first_nonfinite(
    model: nn.Module, images: Tensor, cast: Callable[[], AbstractContextManager[object]] = nullcontext
) -> str | None:
    """In words, the first place where ``model`` has a value that is not finite: images, weights or a layer's output.

    Runs the model once more, in the mode it is in, with copies in place of its buffers. ``None``: every layer's output
    is finite.
    """
    if not _finite(images):
        return "the images themselves"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weights {name}"
    found: list[str] = []

    def looking(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                found.append(f"the output of {name} ({type(module).__name__})")

        return look

    # Hooks of inner modules run before those of outer ones, so the first found is the innermost.
    handles = [module.register_forward_hook(looking(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), cast():
            functional_call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, (images,))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_nonfinite_gradient(model: nn.Module) -> str:
    """In words, the last parameter (the first in the backward pass) whose gradient is not finite."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name}"
    return "the norm of the whole gradient"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(whole(tensor)).all())
