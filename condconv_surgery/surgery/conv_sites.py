"""From a model to its ``ConvSite`` list: every layer that could become conditional, and what is known of it.

Names and identities come from the module tree, order, calls and shapes from one forward pass in each mode, what
follows a layer from fx. Each source may fail alone: a model that cannot be traced still has sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from condconv_surgery.errors import InputError, listed, one_line
from condconv_surgery.surgery.clone_and_run import Named, exchanged
from condconv_surgery.surgery.fx_trace import trace
from condconv_surgery.surgery.observe import Calls, observe
from condconv_surgery.surgery.weight_reads import Reads, reading


@dataclass(frozen=True)
class ConvSite:
    """One layer of the model, once, however many names and calls it has.

    names: every qualified name; the first is ``name``.
    calls: per forward pass (the larger of the two modes); 0 when it is never called.
    order: place of its first call among all layers; layers never called come last.
    input, output: shapes of the first call, with the batch; ``None`` when never called.
    pooled: its input is a 1x1 map at every picture size (squeeze-and-excite).
    block: the nearest module around it that is not a bare container and holds more than one layer; ``""`` is the model.
    followed_by: class or function names that take its output; empty where the graph could not be traced.
    read_by: the class, if any, that computes with its weight outside of it.
    bypassed_by: the class, if any, that calls its ``forward`` directly, past its hooks.
    held: it is called from where no exchange in the module tree reaches, a list say.
    tied_to: another name of its weight or bias, in another module; empty when only this one holds them.
    """

    names: tuple[str, ...]
    module: nn.Module = field(repr=False)
    calls: int
    order: int
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None
    pooled: bool
    block: str
    followed_by: tuple[str, ...]
    read_by: str = ""
    bypassed_by: str = ""
    held: bool = False
    tied_to: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def linear(self) -> bool:
        """It is an ``nn.Linear``."""
        return isinstance(self.module, nn.Linear)


@dataclass(frozen=True)
class Sites:
    """All sites in call order.

    modes: those in which the model runs on the example, ``False`` for eval and ``True`` for train.
    notes: why parts of the model could not be traced, run or seen, one line each.
    functional: parameters that ``F.conv2d`` takes with no layer around it, and the class that calls it.
    """

    sites: tuple[ConvSite, ...]
    modes: tuple[bool, ...]
    notes: tuple[str, ...]
    functional: tuple[tuple[str, str], ...] = ()


def find_sites(model: nn.Module, arguments: tuple[Any, ...]) -> Sites:
    """Every ``nn.Conv2d`` (subclasses too) and ``nn.Linear`` of ``model``.

    arguments: what its forward takes. Raises ``InputError`` when it can run in neither mode.
    """
    names = _names_by_identity(model)
    layers = {first: module for (first, *_), module in names}
    reads = Reads()
    seen, notes = _observe_both_modes(model, names, arguments, reads)
    in_eval, in_train = seen.get(False, {}), seen.get(True, {})
    pooled = _pooled_at_twice_the_size(model, layers, arguments, in_eval)
    traces = trace(model, layers.values())
    notes += _untraceable(traces.untraceable)
    notes += [
        f"{who} convolves with a parameter that the model does not register, in a list say: left alone"
        for who in sorted(reads.nameless)
    ]
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = _holders(model)
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
                output=known.outputs[0] if known and known.outputs else None,
                pooled=first in pooled,
                block=_block(first, modules),
                followed_by=next((traces.followed_by[n] for n in all_names if n in traces.followed_by), ()),
                read_by=reads.weights.get(first, ""),
                bypassed_by=reads.forwards.get(first, ""),
                held=any(c.elsewhere for c in (calls, train_calls) if c),
                tied_to=next(
                    (n for p in module.parameters(recurse=False) for m, n in holders[id(p)] if m != id(module)), ""
                ),
            )
        )
    ordered = tuple(sorted(sites, key=lambda site: site.order))
    return Sites(ordered, tuple(seen), tuple(notes), tuple(reads.functional.items()))


def _untraceable(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, however many modules have it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name or "the whole model")
    return [f"not traced: {listed(found)}: {reason}" for reason, found in names.items()]


def _holders(model: nn.Module) -> dict[int, list[tuple[int, str]]]:
    """For each parameter (by identity) the modules that hold it, by identity, and its name in each."""
    found: dict[int, list[tuple[int, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((id(module), f"{path}.{name}" if path else name))
    return found


def _names_by_identity(model: nn.Module) -> Named:
    found: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found.setdefault(id(module), ([], module))[0].append(name)
    return [(tuple(names), module) for names, module in found.values()]


def _observe_both_modes(
    model: nn.Module, names: Named, arguments: tuple[Any, ...], reads: Reads
) -> tuple[dict[bool, dict[str, Calls]], list[str]]:
    """The calls in each mode in which the model runs at all, and why not in the other; adds to ``reads``."""
    seen: dict[bool, dict[str, Calls]] = {}
    errors: list[Exception] = []
    notes = []
    for training in (False, True):
        mode = "train" if training else "eval"
        try:
            seen[training], refusal = _observe_exchanged(model, names, arguments, training, reads)
        except Exception as error:  # whatever the user's forward raises
            errors.append(error)
            notes.append(f"not run in {mode} mode: {one_line(error)}")
        else:
            notes += [f"not run in {mode} mode with its layers exchanged: {one_line(refusal)}"] if refusal else []
    if not seen:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in arguments]
        raise InputError(
            f"The model does not run on an input of {shapes}: {one_line(errors[0])}",
            "Its forward must take the example.",
            "convert(model, variant, example=...), or --input-size on the command line",
        ) from errors[0]
    return seen, notes


def _observe_exchanged(
    model: nn.Module, names: Named, arguments: tuple[Any, ...], training: bool, reads: Reads
) -> tuple[dict[str, Calls], Exception | None]:
    """The calls with a stand-in for each layer; where the model does not run so, of the model as it is, and why not."""
    try:
        with exchanged(model, names) as stand_ins, reading(model, stand_ins, reads):
            return observe(model, stand_ins, arguments, training), None
    except Exception as error:  # it may tell its layers by identity, or not run at all
        refusal = error
    layers = {first: module for (first, *_), module in names}
    with reading(model, layers, reads):
        calls = observe(model, layers, arguments, training)
    return calls, refusal


def _pooled_at_twice_the_size(
    model: nn.Module, layers: Mapping[str, nn.Module], arguments: tuple[Any, ...], calls: Mapping[str, Calls]
) -> set[str]:
    """Layers over 1x1 maps. A small picture makes such maps too, so a picture twice the size must agree."""
    candidates = {name for name, call in calls.items() if call.inputs and _is_pixel(call.inputs[0])}
    if not candidates or len(arguments) != 1 or not isinstance(arguments[0], Tensor) or arguments[0].dim() != 4:
        return candidates
    x = arguments[0]
    larger = x.new_empty((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), device="meta")
    try:
        twice = observe(model, {name: layers[name] for name in candidates}, (larger,), training=False)
    except Exception:  # a model of one fixed size: its 1x1 maps are what they are
        return candidates
    return {name for name in candidates if name in twice and _is_pixel(twice[name].inputs[0])}


def _is_pixel(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2:] == (1, 1)


def _block(name: str, modules: Mapping[str, nn.Module]) -> str:
    while "." in name:
        name = name.rpartition(".")[0]
        module = modules[name]
        bare = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if not bare and sum(isinstance(sub, nn.Conv2d) for sub in module.modules()) > 1:
            return name
    return ""
