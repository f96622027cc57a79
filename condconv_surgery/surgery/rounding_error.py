"""Is a large difference an error, or rounding that the model itself amplifies?

(Batch norm over two values does, by a factor of a million; a detector keeps another box.) The same conversion in
float64 tells. A model that refuses float64 is judged by its own noise: how far its float32 outputs move when the layers
in question round otherwise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from condconv_surgery.surgery.proof import Difference, Gap, Outputs, compare, compare_with, require, run_both_modes
from condconv_surgery.surgery.select import Plan

NOISE_FACTOR = 10.0
"""A difference of so many times the model's own noise is still rounding: one draw of the noise is not its largest."""

FLOAT64_BYTES = 8 * 2**30
"""A converted model that takes more in float64 is judged by its noise, which takes no second copy of the experts."""

Change = Callable[[nn.Module], object]


def explain(
    original: Callable[[], nn.Module],
    arguments: tuple[Any, ...],
    plan: Plan,
    change: Change,
    numbers: int,
    before: Outputs,
    found: Difference,
) -> tuple[str, Difference | None]:
    """Why ``found`` is rounding, in words, and the difference in float64 where the model runs in it.

    original: makes a copy of the unconverted model. change: carries the plan out on a model, in place. numbers: in the
    converted model. before: the outputs of the original. Raises ``ProofError`` when ``found`` is more than rounding, or
    nothing can tell.
    """
    too_large = 8 * numbers > FLOAT64_BYTES
    exact = None if too_large else _in_double(original().double(), arguments, plan.modes, change)
    if exact is not None and _covers(exact[0], found):
        difference, before_exact = exact
        require(difference, before_exact, None, otherwise=found)
        return f"on this input the model amplifies rounding; in float64 {_words(difference)}", difference
    try:
        noise = compare(before, _rounded_otherwise(original(), arguments, plan))
    except Exception:  # a layer that does not run in float64 either: nothing can tell
        noise = Difference(None, None)
    require(Difference(_beyond(found.eval, noise.eval), _beyond(found.train, noise.train)), before, None)
    why = "takes too much memory" if too_large else "gives no number back" if exact else "does not run"
    how = f"the model {why} in float64, and as large a difference comes of rounding its layers otherwise"
    return f"{how}: {_words(noise)}", None


def _covers(exact: Difference, found: Difference) -> bool:
    """Every mode that was compared is compared in float64 too. (A detector may find nothing in it.)"""
    pairs = ((exact.eval, found.eval), (exact.train, found.train))
    return all(gap is not None for gap, other in pairs if other is not None)


def _in_double(
    model: nn.Module, arguments: tuple[Any, ...], modes: tuple[bool, ...], change: Change
) -> tuple[Difference, Outputs] | None:
    """The difference and the original's outputs; ``None`` when the original does not run in float64."""
    for given in (_doubled(arguments), (_doubled(arguments[0]), *arguments[1:])):  # targets may have to be float32
        try:
            before = run_both_modes(model, given, modes)
        except Exception:  # whatever a user's forward raises
            continue
        change(model)
        return compare_with(model, given, modes, before), before
    return None


def _doubled(nested: Any) -> Any:
    """Every floating-point tensor of nested arguments as float64, complex ones as complex128."""

    def double(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_complex():
            return leaf.to(torch.complex128)
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(double, nested)


def _rounded_otherwise(model: nn.Module, arguments: tuple[Any, ...], plan: Plan) -> Outputs:
    """The original's outputs when each layer of the plan computes in float64 and rounds once, at its end."""
    for layer in {model.get_submodule(site.name) for site in plan.to_convert}:
        layer.forward = partial(_forward_in_double, copy.copy(layer))
    return run_both_modes(model, arguments, plan.modes)


def _forward_in_double(layer: nn.Module, input: Tensor) -> Tensor:
    output: Tensor = copy.deepcopy(layer).double().forward(input.double())
    return output.to(input.dtype)


def _beyond(gap: Gap | None, noise: Gap | None) -> Gap | None:
    """The gap, unless noise explains it: noise that is infinite (another number of boxes) explains nothing."""
    explained = gap is not None and noise is not None and gap.absolute <= NOISE_FACTOR * noise.absolute < math.inf
    return None if explained else gap


def _words(difference: Difference) -> str:
    largest = max(gap.relative for gap in (difference.eval, difference.train) if gap is not None)
    return f"the relative difference is {largest:.1e}"
