"""Peak memory of a forward pass from the lifetimes of its tensors, on the meta device: allocates nothing."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from condconv_surgery.ops.implementations.blockwise import OPERATOR, forward_blockwise
from condconv_surgery.reporting.measure.forward_arguments import run_without_values
from condconv_surgery.runtime.model_call import call


def peak_activations(model: nn.Module, arguments: tuple[Any, ...]) -> int:
    """Peak bytes of the tensors created in a forward pass in eval mode, without weights and input.

    Of torch's operators; the compiled C++ kernels mix in the cache and take less. Includes mixed kernels, also the
    block of kernels that ``blockwise`` holds for a batch. Does not include what a
    library allocates inside an operator (im2col buffers, reordered weights).
    """

    def peak(inputs: tuple[Any, ...]) -> int:
        with _Lifetimes() as lifetimes:
            call(model, inputs)
        return int(lifetimes.peak)

    return run_without_values(model, arguments, peak)


class _Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the bytes of a storage when an operator first returns it, subtracts them when it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage())  # a weight, an input, or already counted
        if func is OPERATOR:
            with self:  # our own operator: count the tensors that it creates inside
                return forward_blockwise(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size
