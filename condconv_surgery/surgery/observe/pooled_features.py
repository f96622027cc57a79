"""The pooled features that routers will see, collected while the original model runs on images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.runtime.meta_device import on_device
from condconv_surgery.runtime.model_call import call, image_arguments
from condconv_surgery.runtime.modes import device_of, dtype_of, in_mode, without_gradients
from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.surgery.observe.layer_calls import first_input

MOST_IMAGES = 512
"""Calibration stops after so many images."""

FEWEST_IMAGES = 16
"""Fewer images do not show in which directions features vary."""

BATCH = 16
"""Images at a time of a calibration tensor."""


def pooled_features(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[tuple[Any, ...]], training: bool = False
) -> dict[str, Tensor]:
    """The mean over positions of the first input of each module, [N, I] in float64 on the CPU, one row for each image.

    batches: arguments of ``model``, which is as before afterwards. A module that is called several times has as many
    rows for each image; one that is never called is absent.
    """
    rows: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(module, args, kwargs)
            if isinstance(x, Tensor) and x.dim() > 1:
                x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
                rows.setdefault(name, []).append(_pool(module, x).double().cpu())

        return record

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with in_mode(model, training), without_gradients(model), preserving_state(model):
            for arguments in batches:
                call(model, on_device(arguments, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def calibration_batches(model: nn.Module, images: Tensor | Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The arguments of ``model`` for up to ``MOST_IMAGES`` images.

    images: one tensor [N, C, H, W], or an iterable of such, of tuples whose first element is one (a ``DataLoader``) or
        of dicts that hold one (a set of Hugging Face).

    Raises ``InputError`` for anything else.
    """
    dtype = dtype_of(model)
    count = 0
    for batch in torch.split(images, BATCH) if isinstance(images, Tensor) else images:
        x = _images_in(batch)
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise InputError(
                f"calibration= holds a {type(x).__name__} of shape {tuple(getattr(x, 'shape', ()))}.",
                "It is a tensor of images [N, C, H, W], or batches of them, alone, first in a tuple or in a dict.",
                "calibration=torch.utils.data.DataLoader(images, batch_size=32)",
            )
        if not x.is_floating_point():
            raise InputError(
                f"calibration= holds images of {x.dtype}.".replace("torch.", ""),
                "They are given to the model as they are: normalised floats.",
                "a transform with v2.ToDtype(torch.float32, scale=True) and v2.Normalize",
            )
        x = x[: MOST_IMAGES - count]
        count += len(x)
        yield image_arguments(model, x.to(dtype))
        if count >= MOST_IMAGES:
            return
    if count < FEWEST_IMAGES:
        raise InputError(
            f"calibration= has {count} images.",
            f"Directions in which features vary need {FEWEST_IMAGES} at least; 256 are enough.",
            "more images, or no calibration= for random directions",
        )


def _images_in(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((x for x in batch.values() if isinstance(x, Tensor) and x.dim() == 4), batch)
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _pool(module: nn.Module, x: Tensor) -> Tensor:
    """[B, I, H, W] or [I, H, W] or, for a Linear, [B, *, I] -> [B, I]."""
    if isinstance(module, nn.Linear):
        return x.flatten(1, -2).mean(1) if x.dim() > 2 else x
    return (x.unsqueeze(0) if x.dim() == 3 else x).mean((2, 3))
