"""Is a large difference an error, or rounding that the model itself amplifies?

(Batch norm over two values amplifies it by a factor of a million; a detector keeps another box.) The same conversion
in float64 decides. A model that does not run in float64 is judged by its own noise: how far its float32 outputs move
when the layers in question round otherwise.
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

from condconv_surgery.runtime.model_call import Keywords
from condconv_surgery.surgery.conversion_plan import Plan
from condconv_surgery.surgery.proof.compare_outputs import (
    Difference,
    Gap,
    Outputs,
    compare,
    compare_with,
    require_within,
    run_both_modes,
)

NOISE_FACTOR = 10.0
"""A difference of so many times the model's own noise is still rounding: one sample of the noise is not its maximum."""

FLOAT64_BYTES = 8 * 2**30
"""A converted model larger than this in float64 is judged by its noise, which needs no second copy of the experts."""


def fits_in_float64(model: nn.Module) -> bool:
    """Whether ``model`` is small enough to be computed in float64."""
    return 8 * sum(parameter.numel() for parameter in model.parameters()) <= FLOAT64_BYTES


Change = Callable[[nn.Module], object]


def explain_difference(
    make_original: Callable[[], nn.Module],
    arguments: tuple[Any, ...],
    plan: Plan,
    change: Change,
    converted: nn.Module,
    before: Outputs,
    difference: Difference,
) -> tuple[str, Difference | None]:
    """A note why ``difference`` is rounding, and the difference in float64 where the model runs in it.

    make_original: returns a copy of the unconverted model. change: converts a model as planned, in place.
    converted: the model whose outputs differ. before: the outputs of the original.
    Raises ``ProofError`` when ``difference`` is more than rounding, or when neither check can be run.
    """
    too_large = not fits_in_float64(converted)
    in_float64 = None if too_large else difference_in_float64(make_original(), arguments, plan.modes, change)
    if in_float64 is not None and _covers(in_float64[0], difference):
        exact, before_exact = in_float64
        require_within(exact, before_exact, None, shown_as=difference)
        return f"on this input the model amplifies rounding; in float64 {_relative_text(exact)}", exact
    try:
        noise = compare(before, _outputs_rounded_otherwise(make_original(), arguments, plan))
    except Exception:  # a layer that does not run in float64 either: no check is left
        noise = Difference(None, None)
    unexplained = Difference(_unless_noise(difference.eval, noise.eval), _unless_noise(difference.train, noise.train))
    require_within(unexplained, before, None)
    why = "takes too much memory" if too_large else "returns no element" if in_float64 else "does not run"
    cause = f"the model {why} in float64, and as large a difference comes from rounding its layers otherwise"
    return f"{cause}: {_relative_text(noise)}", None


def _covers(exact: Difference, difference: Difference) -> bool:
    """Every mode that was compared is compared in float64 too. (A detector may find nothing in it.)"""
    pairs = ((exact.eval, difference.eval), (exact.train, difference.train))
    return all(gap is not None for gap, other in pairs if other is not None)


def difference_in_float64(
    model: nn.Module, arguments: tuple[Any, ...], modes: tuple[bool, ...], change: Change
) -> tuple[Difference, Outputs] | None:
    """The difference and the original's outputs; ``None`` when the original does not run in float64."""
    model = model.double()
    for inputs in (_to_float64(arguments), _first_to_float64(arguments)):
        try:
            before = run_both_modes(model, inputs, modes)
        except Exception:  # whatever a user's forward raises
            continue
        change(model)
        return compare_with(model, inputs, modes, before), before
    return None


def _first_to_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The images alone: targets may need float32."""
    first, *others = arguments
    if isinstance(first, Keywords):
        name = next(iter(first))
        return (Keywords({**first, name: _to_float64(first[name])}),)
    return (_to_float64(first), *others)


def _to_float64(nested: Any) -> Any:
    def double(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_complex():
            return leaf.to(torch.complex128)
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(double, nested)


def _outputs_rounded_otherwise(model: nn.Module, arguments: tuple[Any, ...], plan: Plan) -> Outputs:
    """The original's outputs when each layer of the plan computes in float64 and rounds once, at its end."""
    for layer in {model.get_submodule(site.name) for site in plan.to_convert}:
        layer.forward = partial(_forward_in_float64, copy.copy(layer))
    return run_both_modes(model, arguments, plan.modes)


def _forward_in_float64(layer: nn.Module, input: Tensor) -> Tensor:
    output: Tensor = copy.deepcopy(layer).double().forward(input.double())
    return output.to(input.dtype)


def _unless_noise(gap: Gap | None, noise: Gap | None) -> Gap | None:
    """The gap, unless noise explains it: infinite noise (another number of boxes) explains nothing."""
    explained = gap is not None and noise is not None and gap.absolute <= NOISE_FACTOR * noise.absolute < math.inf
    return None if explained else gap


def _relative_text(difference: Difference) -> str:
    largest = max(gap.relative for gap in (difference.eval, difference.train) if gap is not None)
    return f"the relative difference is {largest:.1e}"
