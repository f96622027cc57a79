"""From a model to its ``ConvSite`` list: every layer that could become conditional, and what is known of it.

Names and identities come from the module tree; order, calls and shapes from one forward pass in each mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.layers import Router
from condconv_surgery.layers.find_layers import named_layers
from condconv_surgery.runtime.model_call import values_of
from condconv_surgery.surgery.observe.adapters import adapters_by_prefix
from condconv_surgery.surgery.observe.clone_and_run import NamedLayers, run_clones
from condconv_surgery.surgery.observe.layer_calls import Calls, observe
from condconv_surgery.surgery.observe.weight_reads import WeightReads, recording_reads


@dataclass(frozen=True)
class ConvSite:
    """One layer of the model, once, however many names and calls it has.

    names: every qualified name; the first is ``name``.
    calls: per forward pass (the larger of the two modes); 0 when it is never called.
    order: place of its first call among all layers; layers never called come last.
    input: its shape in the first call, with the batch; ``None`` when never called.
    pooled: its input is a 1x1 map at every image size (squeeze-and-excite).
    read_by: the class, if any, that computes with its weight outside of it.
    bypassed_by: the class, if any, that calls its ``forward`` directly, past its hooks.
    unreachable: it is called through a list or closure, where ``set_submodule`` cannot replace it.
    adapter: the class of the PEFT adapter around it, if any.
    tied_to: another name of its weight or bias, in another module; empty when no other module holds them.
    head: it is a convolution that gives the logits, as in SqueezeNet.
    """

    names: tuple[str, ...]
    module: nn.Module = field(repr=False)
    calls: int
    order: int
    input: tuple[int, ...] | None
    pooled: bool
    read_by: str = ""
    bypassed_by: str = ""
    unreachable: bool = False
    adapter: str = ""
    tied_to: str = ""
    head: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def linear(self) -> bool:
        return isinstance(self.module, nn.Linear)


@dataclass(frozen=True)
class Sites:
    """All sites in call order.

    modes: those in which the model runs on the example, ``False`` for eval and ``True`` for train.
    notes: what could not be run or seen, one line each.
    functional: parameters that ``F.conv2d`` takes outside of all layers, each with the class that calls it.
    """

    sites: tuple[ConvSite, ...]
    modes: tuple[bool, ...]
    notes: tuple[str, ...]
    functional: tuple[tuple[str, str], ...] = ()


def find_sites(model: nn.Module, arguments: tuple[Any, ...]) -> Sites:
    """Every ``nn.Conv2d`` (subclasses too) and ``nn.Linear`` of ``model``.

    arguments: of its forward. The model is run in both modes, and is as before afterwards; what else uses it at the
    same time is disturbed. Raises ``InputError`` when it runs in neither mode.
    """
    names = _outside_routers(model, named_layers(model, nn.Conv2d, nn.Linear))
    layers = {first: module for (first, *_), module in names}
    reads = WeightReads()
    calls_by_mode, notes = _observe_both_modes(model, names, arguments, reads)
    in_eval, in_train = calls_by_mode.get(False, {}), calls_by_mode.get(True, {})
    pooled = _pooled_at_twice_the_size(model, layers, arguments, in_eval)
    notes += [
        f"{who} convolves with a parameter that the model does not register, in a list say: not converted"
        for who in sorted(reads.nameless)
    ]
    holders, adapters = _holders(model), adapters_by_prefix(model)
    sites = []
    for all_names, module in names:
        first = all_names[0]
        calls, train_calls = in_eval.get(first), in_train.get(first)
        known = calls or train_calls
        sites.append(
            ConvSite(
                names=all_names,
                module=module,
                calls=max(len(c.inputs) if c else 0 for c in (calls, train_calls)),
                order=known.order if known else len(names),
                input=known.inputs[0] if known and known.inputs else None,
                pooled=first in pooled,
                read_by=reads.weights.get(first, ""),
                bypassed_by=reads.forwards.get(first, ""),
                unreachable=first in reads.elsewhere or any(c.elsewhere for c in (calls, train_calls) if c),
                adapter=next((cls for prefix, cls in adapters.items() if first.startswith(prefix)), ""),
                tied_to=next(
                    (n for p in module.parameters(recurse=False) for m, n in holders[id(p)] if m != id(module)), ""
                ),
                head=bool(known and known.head),
            )
        )
    ordered = tuple(sorted(sites, key=lambda site: site.order))
    return Sites(ordered, tuple(calls_by_mode), tuple(notes), tuple(reads.functional.items()))


def _outside_routers(model: nn.Module, names: NamedLayers) -> NamedLayers:
    """Without the layers inside a router of an earlier conversion, which are no layers of the network."""
    modules = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}." for name, module in modules if isinstance(module, Router))
    return [(own, module) for own, module in names if not own[0].startswith(inside)]


def _holders(model: nn.Module) -> dict[int, list[tuple[int, str]]]:
    """For each parameter (by identity) the modules that hold it, by identity, and its name in each."""
    holders: dict[int, list[tuple[int, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((id(module), f"{path}.{name}" if path else name))
    return holders


def _observe_both_modes(
    model: nn.Module, names: NamedLayers, arguments: tuple[Any, ...], reads: WeightReads
) -> tuple[dict[bool, dict[str, Calls]], list[str]]:
    """The calls in each mode in which the model runs, and notes for the other; adds to ``reads``."""
    calls_by_mode: dict[bool, dict[str, Calls]] = {}
    errors: list[Exception] = []
    notes = []
    for training in (False, True):
        mode = "train" if training else "eval"
        try:
            calls_by_mode[training], clone_error = _observe_clones(model, names, arguments, training, reads)
        except Exception as error:  # whatever the user's forward raises
            errors.append(error)
            notes.append(f"not run in {mode} mode: {one_line(error)}")
        else:
            if clone_error:
                notes.append(f"not run in {mode} mode with clones of its layers: {one_line(clone_error)}")
    if not calls_by_mode:
        fix = "input_size=224, where that is too small, or example= with an input that it takes"
        halves = {t.dtype for t in model.parameters()} & {torch.float16, torch.bfloat16}
        if halves and any(isinstance(a, Tensor) and a.dtype == torch.float32 for a in values_of(arguments)):
            fix = "model.float() before, or an example in the dtype of its weights"
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in values_of(arguments)]
        raise InputError(
            f"The model does not run on an input of {shapes}: {one_line(errors[0])}",
            "Its forward must take the example.",
            fix,
        ) from errors[0]
    return calls_by_mode, notes


def _observe_clones(
    model: nn.Module, names: NamedLayers, arguments: tuple[Any, ...], training: bool, reads: WeightReads
) -> tuple[dict[str, Calls], Exception | None]:
    """The calls with a clone in the place of each layer, else with the layers themselves and the clones' error."""
    try:
        with run_clones(model, names) as clones, recording_reads(model, clones, reads):
            return observe(model, clones, arguments, training), None
    except Exception as error:  # it may look its layers up by identity, or not run at all
        clone_error = error
    layers = {first: module for (first, *_), module in names}
    with recording_reads(model, layers, reads):
        calls = observe(model, layers, arguments, training)
    return calls, clone_error


def _pooled_at_twice_the_size(
    model: nn.Module, layers: Mapping[str, nn.Module], arguments: tuple[Any, ...], calls: Mapping[str, Calls]
) -> set[str]:
    """Layers over 1x1 maps. A small image gives such maps too, so an image of twice the size must give them as well."""
    candidates = {name for name, call in calls.items() if call.inputs and _is_1x1_map(call.inputs[0])}
    values = values_of(arguments)
    if not candidates or len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
        return candidates

    def enlarge(x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))

    larger = tuple(pytree.tree_map(enlarge, arguments))
    try:
        twice = observe(model, {name: layers[name] for name in candidates}, larger, training=False)
    except Exception:  # a model of one fixed size: its 1x1 maps are what they are
        return candidates
    return {name for name in candidates if name in twice and _is_1x1_map(twice[name].inputs[0])}


def _is_1x1_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2:] == (1, 1)
