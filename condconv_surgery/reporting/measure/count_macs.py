"""Count one forward pass: multiply-accumulates, calls and output bytes of each module.

``torch.utils.flop_counter.FlopCounterMode`` counts. Hooks read its total when a module is entered and left, and
subtract the MACs of submodules, so every product belongs to exactly one module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from condconv_surgery.errors import InputError
from condconv_surgery.reporting.measure.forward_arguments import run_without_values
from condconv_surgery.runtime.meta_device import META
from condconv_surgery.runtime.model_call import call, values_of


@dataclass
class ModuleCount:
    """The counts of one module, summed over its calls.

    macs: of the module itself, without its submodules. outputs: shape of each call's first output tensor.
    result: the output of its last call, on the meta device (shapes only).
    """

    macs: int = 0
    output_bytes: int = 0
    output_values: int = 0
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    result: Any = None


@dataclass
class Counts:
    """The counts of one forward pass. outside: MACs outside of any module."""

    modules: dict[nn.Module, ModuleCount]
    outside: int


def count(model: nn.Module, arguments: tuple[Any, ...]) -> Counts:
    """Count a forward pass in eval mode, on the meta device where the model allows it.

    Raises ``InputError`` when the model does not run on the arguments. Leaves the model unchanged.
    """
    try:
        with _without_fused_attention():
            return run_without_values(model, arguments, partial(_run, model))
    except Exception as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in values_of(arguments)]
        raise InputError(
            f"The model does not run on an input of {shapes}: {type(error).__name__}: {str(error)[:160]}",
            "Its forward must accept the input that is counted.",
            "inputs=, or input_size= when the model is loaded",
        ) from error


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Disable fused attention kernels: FlopCounterMode cannot see their matrix products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> Counts:
    meter = FlopCounterMode(display=False)
    modules: dict[nn.Module, ModuleCount] = {}
    entered: list[list[int]] = [[0, 0]]  # per running module: total at entry, FLOPs of submodules

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append([meter.get_total_flops(), 0])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        start, inside = entered.pop()
        flops = meter.get_total_flops() - start
        entered[-1][1] += flops
        _add(modules.setdefault(module, ModuleCount()), (flops - inside) // 2, output)

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        with meter:
            call(model, arguments)
    return Counts(modules, (meter.get_total_flops() - entered[0][1]) // 2)


def _add(counted: ModuleCount, macs: int, output: Any) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    counted.macs += macs
    counted.output_values += sum(t.numel() for t in tensors)
    counted.output_bytes += sum(t.numel() * t.element_size() for t in tensors)
    if tensors:
        counted.outputs.append(tuple(tensors[0].shape))
    # On the meta device: a report of a large model must not hold its activations.
    counted.result = pytree.tree_map(lambda leaf: leaf.to(META) if isinstance(leaf, Tensor) else leaf, output)
