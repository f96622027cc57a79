"""Weights of which a file holds parts: those that a module computes at each call are computed once here.

pruning           X = X_orig * X_mask
weight_norm       X = g * v / |v|                         X_g, X_v or parametrizations.X.original0, .original1
spectral_norm     X = W / (u . W v), W as a matrix        X_orig, X_u, X_v or parametrizations.X.original, .0._u, .0._v
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from condconv_surgery.errors import InputError

State = dict[str, Tensor]

OBSERVERS = re.compile(r"(^|\.)(activation_post_process|weight_fake_quant)(_\d+)?\.")
"""In names of what torch.ao puts beside the weights before it quantises."""

_OTHER = re.compile(r"(?:^|\.)parametrizations\.\w+\.original")

_LOG = logging.getLogger("condconv_surgery")


@dataclass(frozen=True)
class Form:
    """One way to keep a weight in parts.

    parts: their names after that of the module, with {} for the name of the weight. compute: the weight from them;
    ``None`` where their shapes are those of something else.
    """

    name: str
    parts: tuple[str, ...]
    compute: Callable[..., Tensor | None]


@dataclass(frozen=True)
class Found:
    """The parts of one weight among the names of a state dict. whole: the weight's own name."""

    form: Form
    parts: tuple[str, ...]
    whole: str


def plain_weights(state: State, model_names: Collection[str], what: str) -> State:
    """``state`` with every weight computed from its parts, unless the model has such parts itself.

    what: the file, in log lines. Raises ``InputError`` for a parametrization that is not known.
    """
    if any(_OTHER.search(name) or _found(name, model_names) for name in model_names):
        return state
    plain: State = {}
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    for name, tensor in _without_observers(state, what).items():
        if name in taken:
            continue
        for found in _found(name, state):
            weight = found.form.compute(*(state[part] for part in found.parts))
            if weight is not None:
                plain[found.whole] = weight
                taken.update(found.parts)
                counts[found.form.name] += 1
                break
        else:
            plain[name] = tensor
    for form, count in counts.items():
        _LOG.warning("%s: applied %s to %d tensors, which are plain ones from here on", what, form, count)
    unknown = next(filter(_OTHER.search, plain), None)
    if unknown is not None:
        raise _unknown_form(unknown, what)
    return plain


def _found(name: str, names: Collection[str]) -> list[Found]:
    """The forms of which ``name`` can be a part with the other ``names``."""
    found = []
    for form in FORMS:
        for part in form.parts:
            match = re.fullmatch(r"((?:.*\.)?)" + re.escape(part).replace(r"\{\}", r"(\w+)"), name)
            parts = tuple(match[1] + other.format(match[2]) for other in form.parts) if match else ()
            if match and all(other in names for other in parts):
                found.append(Found(form, parts, match[1] + match[2]))
    return found


def _pruned(weight: Tensor, mask: Tensor) -> Tensor | None:
    return weight * mask if weight.shape == mask.shape else None


def _weight_normed(g: Tensor, v: Tensor) -> Tensor | None:
    if g.dim() not in (0, v.dim()) or any(side not in (1, whole) for side, whole in zip(g.shape, v.shape)):  # noqa: B905
        return None
    dims = [dim for dim in range(v.dim()) if g.dim() == 0 or g.shape[dim] == 1]
    return v * (g / torch.linalg.vector_norm(v, dim=dims, keepdim=True)) if dims else None


def _spectrally_normed(weight: Tensor, u: Tensor, v: Tensor) -> Tensor | None:
    if weight.dim() < 2:
        return None
    orders = (weight.flatten(1), weight.transpose(0, 1).flatten(1))  # the second of a transposed convolution
    products = [matrix @ v for matrix in orders if matrix.shape == (u.numel(), v.numel())]
    if not products:
        return None
    sigmas = [torch.dot(u, product) for product in products]  # u is the direction of the right product
    aligned = [float(sigma / product.norm()) for sigma, product in zip(sigmas, products, strict=True)]
    return weight / sigmas[aligned.index(max(aligned))]


FORMS = (
    Form("pruning masks", ("{}_orig", "{}_mask"), _pruned),
    Form("spectral_norm", ("{}_orig", "{}_u", "{}_v"), _spectrally_normed),
    Form("weight_norm", ("{}_g", "{}_v"), _weight_normed),
    Form("weight_norm", ("parametrizations.{}.original0", "parametrizations.{}.original1"), _weight_normed),
    Form(
        "spectral_norm",
        ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"),
        _spectrally_normed,
    ),
)


def _without_observers(state: State, what: str) -> State:
    kept = {name: tensor for name, tensor in state.items() if not OBSERVERS.search(name)}
    if kept and len(kept) < len(state):
        _LOG.warning(
            "%s: left out %d tensors of observers of torch.ao: the weights are not quantised",
            what,
            len(state) - len(kept),
        )
        return kept
    return state


def _unknown_form(name: str, what: str) -> InputError:
    module, _, rest = name.partition("parametrizations.")
    owner = module.removesuffix(".") or "the model"
    return InputError(
        f"{what} holds {name}, from which a parametrization computes the weight of {owner}.",
        "Pruning, weight_norm and spectral_norm are computed here; others are code, which the file does not hold.",
        f"torch.nn.utils.parametrize.remove_parametrizations(module, {rest.partition('.')[0]!r}) for each such module "
        "where the model was made, then torch.save(model.state_dict(), 'model.pt')",
    )
