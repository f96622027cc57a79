"""Check that a model can be converted, and take wrappers off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from condconv_surgery.errors import InputError
from condconv_surgery.runtime.wrappers import is_compiled, unwrapped


def accept(model: object, *, inplace: bool = False, prove: bool = False) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` and ``torch.compile``.

    Raises ``InputError`` when it is not supported: no ``nn.Module``, TorchScript, a graph of ATen operators, lazy
    layers, sharded parameters; weights on the meta device with ``prove``; a ``DistributedDataParallel`` in place, which
    has registered its parameters already.
    """
    if not isinstance(model, nn.Module):
        fix = "convert the nn.Module from which it was exported, then export that"
        raise InputError(f"convert was given a {type(model).__name__}.", "It takes an nn.Module.", fix)
    inner = unwrapped(model)
    if inplace:
        _require_no_process_group(model)
    _require_modules(inner)
    _require_weights(inner, prove)
    return inner


@contextmanager
def running_eagerly(model: nn.Module) -> Iterator[None]:
    """Run compiled modules as plain Python: a conversion runs each module a few times, with hooks."""
    compiled = any(m._compiled_call_impl is not None or is_compiled(m) for m in model.modules())
    # imports the compiler: only if needed
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def _require_no_process_group(model: nn.Module) -> None:
    """Raise ``InputError`` where a ``DistributedDataParallel`` is among the wrappers of ``model``."""
    inner = unwrapped(model)
    if any(isinstance(m, DistributedDataParallel) and unwrapped(m) is inner for m in model.modules()):
        raise InputError(
            "A DistributedDataParallel cannot be converted in place: it has registered its parameters already.",
            "Convert the model, then wrap it.",
            "DistributedDataParallel(convert(ddp.module, ...).model)",
        )


def _require_modules(model: nn.Module) -> None:
    if isinstance(model, (nn.Conv2d, nn.Linear)):
        raise InputError(
            f"The model is a single {type(model).__name__}.",
            "A layer is replaced in the module that holds it.",
            "convert(nn.Sequential(layer), ..., skip_stem=False)",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "The model is TorchScript, whose code is fixed.",
            "Python modules can be converted.",
            "convert the model from which it was scripted or traced, then script that",
        )
    if isinstance(model, fx.GraphModule) and any(isinstance(n.target, OpOverload) for n in model.graph.nodes):
        raise InputError(
            "The model is a graph of ATen operators, as torch.export makes: mode and layers are fixed in it.",
            "A graph as torch.fx.symbolic_trace makes it can be converted, or the model itself.",
            "convert the model, then torch.export.export it",
        )


def _require_weights(model: nn.Module, prove: bool) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"{name} belongs to a lazy layer, which has no weights yet.",
                "A layer is known once the model has run.",
                "model(example) first, then convert",
            )
        if isinstance(parameter, DTensor):
            raise InputError(
                f"{name} is split over processes.",
                "A model is converted whole.",
                "convert first, then fully_shard (engine.shard=True of a training run)",
            )
        if prove and parameter.is_meta:
            raise InputError(
                f"{name} is on the meta device: there are no weights to compute with.",
                "The proof runs both models.",
                "convert(..., prove=False) for the architecture alone, or load the weights first",
            )
