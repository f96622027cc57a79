"""Building a model for its names and shapes alone: no memory, no initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.models.build_model import build
from condconv_surgery.recipe import Source

_INITIALISING = ("uniform_", "normal_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_")


def build_hollow(source: Source) -> nn.Module:
    """The model of a torchvision or timm source, its parameters on the meta device where that can be done.

    (A detector that runs its backbone to learn its widths needs real ones.) Raises as ``build`` does.
    """
    try:
        with without_memory():
            return build(source)
    except InputError:
        return build(source)


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters made inside the block go to the meta device as they are registered, and stay uninitialised.

    (``torch.device("meta")`` would also take the small tensors that some constructors compute with, and fail.)
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    with ExitStack() as changes:
        changes.enter_context(patch.object(nn.Module, "register_parameter", register_on_meta))
        for name in _INITIALISING:
            changes.enter_context(patch.object(Tensor, name, _nothing_on_meta(getattr(Tensor, name))))
        yield


def _nothing_on_meta(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch traces an operation on a meta tensor in Python, which is most of the time of building a network."""

    def on_real_tensors(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.is_meta else method(self, *args, **kwargs)

    return on_real_tensors
