"""Building a model for its names and shapes alone: no memory, no initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from condconv_surgery.errors import InputError
from condconv_surgery.models.build_model import build
from condconv_surgery.recipe import Source

_ALLOCATIONS = (torch.empty, torch.empty_like, torch.empty_strided)
"""What layers make their parameters with, before they initialise them."""

_INITIALISERS = frozenset(("uniform_", "normal_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_"))


def build_on_meta(source: Source) -> nn.Module:
    """The model of a torchvision or timm source, its parameters on the meta device where that can be done.

    (A detector that runs its backbone to learn its widths needs real ones.) Raises as ``build`` does.
    """
    try:
        with UninitialisedOnMeta():
            return build(source)
    except InputError:
        return build(source)


class UninitialisedOnMeta(TorchFunctionMode):
    """In this thread, uninitialised tensors are made on the meta device, and in-place initialisers leave those alone.

    Other threads see nothing of it. (``torch.device("meta")`` would also take the small tensors that some constructors
    compute with, and fail. And torch traces an operation on a meta tensor in Python: initialising would be most of the
    time of building a network.)
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _ALLOCATIONS and "out" not in options:
            return func(*args, **{**options, "device": "meta"})
        first = args[0] if args else options.get("tensor")  # of torch.nn.init
        if isinstance(first, Tensor) and first.is_meta:
            name = getattr(func, "__name__", "")
            if name in _INITIALISERS or (name.endswith("_") and getattr(func, "__module__", "") == "torch.nn.init"):
                return first
        return func(*args, **options)
