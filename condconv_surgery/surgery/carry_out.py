"""Carry a plan out: upcycle, swap and prove; when that fails, the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import Recipe, attach_recipe, recipe_of
from condconv_surgery.runtime.modes import input_spec_of
from condconv_surgery.runtime.tensor_hash import hash_weights
from condconv_surgery.surgery.conversion_job import Job
from condconv_surgery.surgery.conversion_plan import Plan
from condconv_surgery.surgery.copy_model import Places, copy_of, original_of
from condconv_surgery.surgery.observe.conv_sites import ConvSite
from condconv_surgery.surgery.observe.layer_calls import recording
from condconv_surgery.surgery.proof.assumed_subclasses import checking_subclasses, unchecked_notes
from condconv_surgery.surgery.proof.compare_outputs import (
    HALF,
    Difference,
    Outputs,
    compare_with,
    exceeds,
    require_tensors,
    require_within,
    run_both_modes,
)
from condconv_surgery.surgery.proof.rounding_error import explain_difference
from condconv_surgery.surgery.swap import restore, swap
from condconv_surgery.surgery.trained_parameters import hand_over, unaware_notes


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    model: the converted model, of the original's own class (wrappers taken off). plan: which layers were converted,
    which were not and why.
    difference: the proof that it computes the same; ``None`` with ``prove=False``.
    difference_float64: the same in float64, run only where float32 leaves doubt.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    difference: Difference | None
    difference_float64: Difference | None = None


def carry_out(planned: Plan, job: Job) -> Conversion:
    """Convert the job's model as planned."""
    model = job.working_copy()
    made = _plan_in(model, planned, job.prove)
    before = None
    if job.prove:
        before = _original_outputs(model, job, made)
        made = replace(made, notes=(*made.notes, *require_tensors(before)))
    recipe = _recipe_with_hash(model)
    target = job.target(model, made)
    features = job.features(model, made)
    change = partial(swap, plan=made, variant=job.variant, upcycling=job.upcycling, features=features)
    replaced = change(target)
    try:
        original = partial(original_of, target, made, replaced) if target is model else partial(copy_of, model)
        difference, in_float64, notes = _prove(target, original, job, made, before, replaced, change)
    except Exception:
        restore(target, made, replaced)
        raise
    attach_recipe(target, recipe)
    if job.inplace:
        hand_over(job.optimizers, target, made, replaced)
        notes = (*notes, *unaware_notes(replaced))
    if job.wrapper:
        notes = (*notes, f"{job.wrapper} taken off: wrap the converted model again")
    return Conversion(target, replace(made, notes=(*made.notes, *notes)), difference, in_float64)


def _plan_in(model: nn.Module, planned: Plan, prove: bool) -> Plan:
    """The plan with the layers of ``model``; without the notes about what the proof is going to check."""
    unchecked = unchecked_notes(planned.to_convert)
    notes = tuple(note for note in planned.notes if not prove or note not in unchecked)
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = tuple(_site_in(modules, site) for site in planned.to_convert)
    return Plan(sites, planned.skipped, planned.modes, notes, planned.routers)


def _original_outputs(model: nn.Module, job: Job, made: Plan) -> Outputs:
    half = any(p.dtype in HALF for site in made.to_convert for p in site.module.parameters(recurse=False))
    with checking_subclasses(made.to_convert):
        return replace(run_both_modes(model, job.arguments, made.modes), half=half)


def _site_in(modules: Mapping[str, nn.Module], site: ConvSite) -> ConvSite:
    """The site with its layer in ``modules``. Raises ``InputError`` when that is another than was planned."""
    module = modules.get(site.name)
    if type(module) is not type(site.module):
        raise InputError(
            f"{site.name} is no longer the {type(site.module).__name__} of the plan.",
            "A plan is for the model as it was then.",
            "call plan(...) again",
        )
    assert module is not None
    return replace(site, module=module)


def _prove(
    target: nn.Module,
    make_original: Callable[[], nn.Module],
    job: Job,
    made: Plan,
    before: Outputs | None,
    replaced: Places,
    change: Callable[[nn.Module], object],
) -> tuple[Difference | None, Difference | None, tuple[str, ...]]:
    """The difference in float32, in float64 where that was run, and notes. Raises ``ProofError`` when too large."""
    if before is None:
        return None, None, ()
    difference = _run_converted(target, job.arguments, made, before, replaced)
    if job.tolerance is not None or not exceeds(difference, before, None):
        require_within(difference, before, job.tolerance)
        return difference, None, ()
    note, exact = explain_difference(make_original, job.arguments, made, change, target, before, difference)
    return difference, exact, (note,)


def _run_converted(
    model: nn.Module, arguments: tuple[Any, ...], made: Plan, before: Outputs, replaced: Places
) -> Difference:
    """The difference from ``before``. Raises ``InputError`` when a replaced layer is still called.

    (The plan skips most such layers; but a forward may check the class of a layer.)
    """
    with recording(dict(replaced)) as called:
        difference = compare_with(model, arguments, made.modes, before)
    for name in called:
        raise InputError(
            f"The model still calls the replaced {name}, through a list or a closure for example.",
            "A layer can be replaced where only attributes of modules, nn.ModuleList and the like hold it.",
            f'nn.ModuleList(layers) in place of the list, or exclude=["{name}"]',
        )
    return difference


def _recipe_with_hash(model: nn.Module) -> Recipe:
    """The recipe with the hash of the original weights, so taken before they change."""
    recipe = recipe_of(model) or Recipe(input=input_spec_of(model))
    return recipe if recipe.weights_sha256 else replace(recipe, weights_sha256=hash_weights(model))
