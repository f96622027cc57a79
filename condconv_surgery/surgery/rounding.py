"""Is a large difference an error, or rounding that the model itself amplifies?

(Batch norm over two values does, by a factor of a million; a detector keeps another box.) The same conversion in
float64 tells. A model that refuses float64 is judged by its own noise: how far its float32 outputs move when the layers
in question round otherwise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from condconv_surgery.surgery.proof import Difference, Gap, Outputs, compare, compare_with, require, run_both_modes
from condconv_surgery.surgery.selection import Plan

NOISE_FACTOR = 10.0
"""A difference of so many times the model's own noise is still rounding: one draw of the noise is not its largest."""

Change = Callable[[nn.Module], object]


def explain(
    original: nn.Module, arguments: tuple[Any, ...], plan: Plan, change: Change, found: Difference
) -> tuple[str, Difference | None]:
    """Why ``found`` is rounding, in words, and the difference in float64 where the model runs in it.

    original: the unconverted model, of which copies are made. change: carries the plan out on a model, in place.
    Raises ``ProofError`` when ``found`` is more than rounding, or nothing can tell.
    """
    exact = _in_double(original, arguments, plan.modes, change)
    if exact is not None:
        difference, before = exact
        require(difference, before, None, otherwise=found)
        return f"on this input the model amplifies rounding; in float64 {_words(difference)}", difference
    before = run_both_modes(original, arguments, plan.modes)
    noise = compare(before, _rounded_otherwise(original, arguments, plan))
    require(Difference(_beyond(found.eval, noise.eval), _beyond(found.train, noise.train)), before, None)
    how = "the model does not run in float64, and as large a difference comes of rounding its layers otherwise"
    return f"{how}: {_words(noise)}", None


def in_double(nested: Any) -> Any:
    """Every floating-point tensor of nested arguments as float64."""

    def double(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(double, nested)


def _in_double(
    original: nn.Module, arguments: tuple[Any, ...], modes: tuple[bool, ...], change: Change
) -> tuple[Difference, Outputs] | None:
    """``None`` when the original does not run in float64."""
    model = copy.deepcopy(original).double()
    for given in (in_double(arguments), (in_double(arguments[0]), *arguments[1:])):  # targets may have to be float32
        try:
            before = run_both_modes(model, given, modes)
        except Exception:  # whatever a user's forward raises
            continue
        change(model)
        return compare_with(model, given, modes, before), before
    return None


def _rounded_otherwise(original: nn.Module, arguments: tuple[Any, ...], plan: Plan) -> Outputs:
    """The original's outputs when each layer of the plan computes in float64 and rounds once, at its end."""
    model = copy.deepcopy(original)
    for layer in {model.get_submodule(site.name) for site in plan.kept}:
        exact = copy.deepcopy(layer).double()

        def forward(x: Tensor, exact: nn.Module = exact) -> Any:
            return exact.forward(x.double()).to(x.dtype)

        layer.forward = forward
    return run_both_modes(model, arguments, plan.modes)


def _beyond(gap: Gap | None, noise: Gap | None) -> Gap | None:
    """The gap, unless noise explains it: noise that is infinite (another number of boxes) explains nothing."""
    explained = gap is not None and noise is not None and gap.absolute <= NOISE_FACTOR * noise.absolute < math.inf
    return None if explained else gap


def _words(difference: Difference) -> str:
    largest = max(gap.relative for gap in (difference.eval, difference.train) if gap is not None)
    return f"the relative difference is {largest:.1e}"
