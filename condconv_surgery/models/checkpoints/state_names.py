"""The names in a state dict: which part of it is the network, and without which prefix.

Wrappers put prefixes before every name, and self-supervised training stores several networks side by side (the query
and the key encoder of MoCo, DINO's student and teacher) with heads, queues and weights of losses beside them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from condconv_surgery.errors import listed
from condconv_surgery.models.checkpoints.outer_layers import outer_layers, shapes_of

NETWORKS = (
    *("teacher", "encoder_q", "base_encoder", "online_network", "online_encoder", "online", "encoder", "backbone"),
    "student",
)
"""Modules that hold the network where others stand beside it; the first one that fits as well as any is taken."""

WRAPPERS = ("module", "_orig_mod", "model", "net", "network")
"""Modules that hold the network of a wrapper, beside little else: a loss with weights."""

INNER_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of the names of modules inside which one was compiled, sharded or recomputes its activations."""

AVERAGED_WORDS = frozenset(("ema", "swa", "avg", "average", "averaged", "polyak", "shadow"))
"""Words in names of averaged weights: ``swa_model``, ``netG_ema``. They are taken before others."""

OPTIONAL = ("num_batches_tracked",)

T = TypeVar("T")

_LOG = logging.getLogger("condconv_surgery")


def fitting_names(state: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The part of ``state`` that is the network, without prefixes; with those that the names of ``model`` have.

    With ``model``: the names as they are if all are its own, else after the prefix under which most of its tensors are
    found, else as an ``nn.Sequential`` of its children. Tensors beside the network are left out if all of its own, but
    for a classifier's head, are there: under another prefix, or of modules at the top that it does not have. Without:
    prefixes that all names have are removed, and networks among other modules are taken. A log line says what was left
    out.
    """
    if model is None:
        state = without_inner_wrappers(_student_alone(state))
        taken = _of_network(state)
    else:
        wanted = model.state_dict().keys()
        if state.keys() <= wanted:
            return state
        if not any(map(INNER_WRAPPERS.search, wanted)):
            state = without_inner_wrappers(state)
        taken = _of_model(state, model)
    left = [name for name, tensor in state.items() if not any(tensor is t for t in taken.values())]
    if model is not None and taken and any(not name.endswith("n_averaged") for name in left):
        _LOG.warning("left out %s: the network has no such tensors", listed(left))
    return taken


def without_inner_wrappers(state: Mapping[str, T]) -> dict[str, T]:
    """``state`` with the names that it has without ``torch.compile``, FSDP and activation checkpoints."""
    return {INNER_WRAPPERS.sub("", name): value for name, value in state.items()}


def is_average_of(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> bool:
    """Whether a teacher may be the average of a student, as in DINO: of distillation it is another network."""
    own, theirs = (
        {name.removeprefix("module."): tensor.shape for name, tensor in state.items()} for state in (teacher, student)
    )
    return 2 * sum(theirs.get(name) == shape for name, shape in own.items()) > len(own)


def is_averaged(name: str) -> bool:
    """Whether a name says that it is of averaged weights."""
    words = re.findall(r"[a-z]+", re.sub(r"([A-Z]+)", r"_\1", name).lower())
    return not AVERAGED_WORDS.isdisjoint(words)


def parts_of(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors under each prefix that a quarter of all names have, without it; the likeliest network first."""
    prefixes = sorted(_prefixes_of(state, minimum=max(len(state) // 4, 1)), key=_preference)
    return [_under(state, prefix) for prefix in prefixes]


def as_children(state: Mapping[str, T], children: Sequence[str]) -> dict[str, T]:
    """Names of ``nn.Sequential(*network.children())``, which begin with a number, as the network has them."""
    renamed = {}
    for name, value in state.items():
        number, dot, rest = name.partition(".")
        known = number.isdigit() and int(number) < len(children)
        renamed[f"{children[int(number)]}{dot}{rest}" if known else name] = value
    return renamed


def _student_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the teacher of a distillation beside a student of another architecture."""
    prefixes = _prefixes_of(state, minimum=1)
    for prefix in prefixes:
        teacher = f"{prefix.removesuffix('student.')}teacher."
        if not prefix.endswith("student.") or teacher not in prefixes:
            continue
        if not is_average_of(_under(state, teacher), _under(state, prefix)):
            return {name: tensor for name, tensor in state.items() if not name.startswith(teacher)}
    return state


def _of_model(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    wanted = model.state_dict()
    parts = {prefix: _under(state, prefix) for prefix in _prefixes_of(state, minimum=max(len(wanted) // 2, 1))}
    parts = {"": state, **parts}
    found = _names_found(parts, wanted)
    if not max(found.values()):
        children = [name for name, _ in model.named_children()]
        parts = {prefix: as_children(part, children) for prefix, part in parts.items()}
        found = _names_found(parts, wanted)
    most = max(found.values())
    if not most:
        return _of_network(state)
    prefix = min((prefix for prefix, count in found.items() if count == most), key=_preference)
    part = parts[prefix]
    if is_averaged(prefix):
        _LOG.warning("took the averaged weights, whose names begin with %r", prefix)
    tops = {name.partition(".")[0] for name in wanted}
    outer = outer_layers(shapes_of(wanted))
    needed = [name for name in wanted if not name.endswith(OPTIONAL)]
    complete = all(name in part for name in needed if outer is None or not name.startswith(outer.group))
    return {name: t for name, t in part.items() if name.partition(".")[0] in tops} if complete else part


def _names_found(parts: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Tensor]) -> dict[str, int]:
    """How many of the names of a network each part has; half as much for a tensor of another shape (a stem, a head)."""
    return {
        prefix: sum(1 + (part[name].shape == tensor.shape) for name, tensor in wanted.items() if name in part)
        for prefix, part in parts.items()
    }


def _of_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes that all names have; of the networks that hold a quarter of the tensors, one alone."""
    part = {name: tensor for name, tensor in state.items() if name != "n_averaged"} or state
    while True:
        tops = Counter(name.partition(".")[0] if "." in name else "" for name in part)
        network = next((name for name in WRAPPERS if tops[name] >= 0.9 * len(part)), None)
        averaged = [name for name in tops if is_averaged(name)]
        network = network or next((name for name in (*averaged, *NETWORKS) if tops[name] * 4 >= len(part)), None)
        if len(tops) == 1 and "" not in tops:
            network = next(iter(tops))
        if network is None or (len(tops) > 1 and _is_a_part(network, tops)):
            return part
        part = _under(part, f"{network}.")


def _is_a_part(network: str, tops: Iterable[str]) -> bool:
    """Whether ``network`` may be a part of an architecture: torchvision's ``backbone`` beside a ``head``."""
    return network in ("backbone", "encoder") and any(top not in (network, "", "criterion") for top in tops)


def _prefixes_of(names: Iterable[str], minimum: int) -> list[str]:
    """Every beginning of a name up to a dot, of at most four parts, that so many names have."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1]
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 4) + 1))
    return [prefix for prefix, count in counts.items() if count >= minimum]


def _preference(prefix: str) -> tuple[int, int]:
    parts = prefix.split(".")
    rank = min((NETWORKS.index(part) for part in parts if part in NETWORKS), default=len(NETWORKS))
    return (-1 if any(map(is_averaged, parts)) else rank, len(parts))


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
