"""Peak memory of a forward pass, from the lifetimes of its tensors; no memory is needed to find it out."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from condconv_surgery.ops.implementations.blockwise import OPERATOR, forward_in_blocks
from condconv_surgery.reporting.measure.report_inputs import materialized
from condconv_surgery.runtime.meta_device import META, meta_state, on_device
from condconv_surgery.runtime.modes import device_of, in_mode, without_gradients
from condconv_surgery.runtime.snapshot import preserving_state


def peak_activations(model: nn.Module, arguments: tuple[Any, ...]) -> int:
    """The most bytes that tensors made in an eval-mode forward pass have at one time, beside weights and input.

    Mixed kernels are among them, the block that ``blockwise`` holds for a batch too. What a library takes inside an
    operator (patches as columns, weights in another order) is not, nor are weights and input.
    """
    with in_mode(model, training=False), without_gradients(model):
        try:
            inputs = on_device(arguments, META)
            with preserving_state(model), meta_state(model), _Lifetimes() as lifetimes:
                model(*inputs)
        except Exception:  # code that needs values
            inputs = materialized(arguments, device_of(model))
            with preserving_state(model), _Lifetimes() as lifetimes:
                model(*inputs)
    return int(lifetimes.peak)


class _Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds a storage when an operator returns it for the first time, takes it off when it is freed."""

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
            with self:  # our own operator is no black box: what it makes inside counts
                return forward_in_blocks(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._born(leaf.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size
