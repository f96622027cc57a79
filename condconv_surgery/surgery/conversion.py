"""``convert``: trace, plan, upcycle, swap, prove. The one orchestrator."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import (
    VARIANTS,
    Recipe,
    Selection,
    Upcycling,
    Variant,
    attach_recipe,
    patterns_of,
    recipe_of,
)
from condconv_surgery.runtime.modes import device_of, input_spec_of
from condconv_surgery.runtime.snapshot import preserving_random_state
from condconv_surgery.runtime.tensor_hash import hash_weights
from condconv_surgery.surgery.accept_model import accept, eagerly
from condconv_surgery.surgery.assumed_subclasses import checked, unchecked
from condconv_surgery.surgery.block_routing import share_routers
from condconv_surgery.surgery.conv_sites import find_sites
from condconv_surgery.surgery.lift_functional import lift_convolutions, undone_on_error
from condconv_surgery.surgery.observe import recording
from condconv_surgery.surgery.proof import (
    HALF,
    Difference,
    Outputs,
    compare_with,
    exceeds,
    require,
    require_tensors,
    run_both_modes,
)
from condconv_surgery.surgery.rounding_error import explain
from condconv_surgery.surgery.select import Plan, Skip, select
from condconv_surgery.surgery.swap import Places, copy_of, copy_to_change, original_of, restore, swap


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    model: the converted model, of the original's own class (wrappers taken off). plan: what was converted and what was
    not, and why.
    difference: the proof that it computes the same; ``None`` when it was not asked for.
    difference_float64: the same in float64, run
    only where float32 leaves doubt.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    difference: Difference | None
    difference_float64: Difference | None = None


def convert(
    model: nn.Module,
    variant: Variant,
    *,
    example: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    min_channels: int = 0,
    skip_stem: bool = True,
    skip_pooled: bool = True,
    classifier: bool = False,
    blocks: Sequence[str] | None = None,
    subclasses: Sequence[str] | None = None,
    diversity: float = 0.1,
    seed: int = 0,
    inplace: bool = False,
    prove: bool = True,
    tolerance: float | None = None,
) -> Conversion:
    """Replace the convolutions of a trained model by conditional ones that compute the same at the start.

        W_b = sum_e gate[b,e] (W + eps_e),    sum_e eps_e = 0,    gate = 1/n at the start

    model: any ``nn.Module`` in Python. A ``torch.fx.GraphModule`` stays one, and its ``F.conv2d`` on parameters are
        converted too (``lift_convolutions``). ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` are
        taken off.
    example: an input, a tuple of all arguments, or what a detector takes; made from the model's own input
        specification when left out (3x224x224 when it has none).
    include, exclude, min_channels, skip_stem, skip_pooled, classifier, blocks, subclasses: see ``recipe.Selection``.
    diversity, seed: see ``recipe.Upcycling``.
    inplace: change ``model`` itself. Otherwise it is left as it was.
    prove: run both models in both modes and compare; ``tolerance`` is absolute, in the output's units, 0 or more.

    Raises ``InputError`` when nothing is left to convert, the example does not fit, the model gives back nothing that
    can be compared or would not call what replaces a layer; ``ProofError`` when the outputs differ, or those of a
    layer of ``subclasses`` are not a plain convolution's. The model is then as it was.
    """
    patterns, names = (patterns_of(include), patterns_of(exclude)), (patterns_of(blocks), patterns_of(subclasses))
    selection = Selection(*patterns, min_channels, skip_stem, skip_pooled, classifier, *names)
    rule = _Rule(selection, variant, Upcycling(diversity, seed), prove, tolerance)
    inner = accept(model, inplace=inplace, prove=prove)
    arguments = example_arguments(inner, example)
    with eagerly(inner), preserving_random_state(inner):
        if isinstance(inner, fx.GraphModule):
            conversion = _convert_graph(inner, arguments, rule, inplace)
        else:
            conversion = _convert(inner, arguments, rule, inplace)
    if inner is model:
        return conversion
    note = f"{type(model).__name__} taken off: wrap the converted model again"
    return replace(conversion, plan=replace(conversion.plan, notes=(*conversion.plan.notes, note)))


def make_plan(
    model: nn.Module, selection: Selection, arguments: tuple[Any, ...], variant: Variant | None = None
) -> Plan:
    """What ``convert`` would do, with nothing changed. variant: says whether blocks share a router."""
    model = accept(model)
    with eagerly(model):
        if not isinstance(model, fx.GraphModule):
            return _noting_claims(_plan(model, selection, arguments, variant))
        copied = copy.deepcopy(model)
        left = _lift(copied, selection)
        return _with_left(_noting_claims(_plan(copied, selection, arguments, variant)), left)


def _noting_claims(plan: Plan) -> Plan:
    """The plan that no proof follows, with what nobody checks."""
    return replace(plan, notes=(*plan.notes, *unchecked(plan.to_convert)))


@dataclass(frozen=True)
class _Rule:
    """What the caller of ``convert`` decided."""

    selection: Selection
    variant: Variant
    upcycling: Upcycling
    prove: bool
    tolerance: float | None

    def __post_init__(self) -> None:
        if not isinstance(self.variant, Variant) or type(self.variant) is Variant:
            known = ", ".join(f"{cls.__name__}()" for cls in VARIANTS.values())
            raise InputError(
                f"convert was given the variant {self.variant!r}.",
                f"It takes an object: one of {known}.",
                "convert(model, CondConv(experts=4))",
            )
        number: object = self.tolerance
        if number is not None and not (isinstance(number, (int, float)) and number >= 0):
            raise InputError(f"tolerance is {self.tolerance!r}.", "It must be a number, 0 or more.", "tolerance=1e-4")


def _convert_graph(model: fx.GraphModule, arguments: tuple[Any, ...], rule: _Rule, inplace: bool) -> Conversion:
    """A graph stays a graph: its functional convolutions are modules first, then it is a model like any other."""
    target = model if inplace else copy.deepcopy(model)
    with undone_on_error(target):
        left = _lift(target, rule.selection)
        conversion = _convert(target, arguments, rule, inplace=True)
    return replace(conversion, plan=_with_left(conversion.plan, left))


def _lift(model: fx.GraphModule, selection: Selection) -> tuple[Skip, ...]:
    left = lift_convolutions(model)
    if left and not selection.classifier and not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise InputError(
            f"No convolution to convert: {left[0].reason}.",
            "F.conv2d becomes a module where its weight is a parameter that nothing else uses, in equal calls.",
            "another model, or --classifier",
        )
    return left


def _with_left(plan: Plan, left: tuple[Skip, ...]) -> Plan:
    """The plan of a graph with the functional convolutions that stay, each under the reason that lifting gave."""
    names = {skip.name for skip in left}
    return replace(plan, skipped=(*(skip for skip in plan.skipped if skip.name not in names), *left))


def _convert(model: nn.Module, arguments: tuple[Any, ...], rule: _Rule, inplace: bool) -> Conversion:
    plan = _plan(model, rule.selection, arguments, rule.variant)
    before = None
    if rule.prove:
        with checked(plan.to_convert):
            before = replace(run_both_modes(model, arguments, plan.modes), half=_is_half(plan))
        plan = replace(plan, notes=(*plan.notes, *require_tensors(before)))
    else:
        plan = _noting_claims(plan)
    recipe = _recipe_with_hash(model)
    target = model if inplace else copy_to_change(model, plan)
    change = partial(swap, plan=plan, variant=rule.variant, upcycling=rule.upcycling)
    undo = change(target)
    exact = None
    try:
        difference = _run_converted(target, arguments, plan, before, undo)
        if before is not None and difference is not None:
            if rule.tolerance is None and exceeds(difference, before, None):
                original = partial(original_of, target, plan, undo) if inplace else partial(copy_of, model)
                numbers = sum(parameter.numel() for parameter in target.parameters())
                note, exact = explain(original, arguments, plan, change, numbers, before, difference)
                plan = replace(plan, notes=(*plan.notes, note))
            else:
                require(difference, before, rule.tolerance)
    except Exception:
        restore(target, plan, undo)
        raise
    attach_recipe(target, recipe)
    return Conversion(target, plan, difference, exact)


def _is_half(plan: Plan) -> bool:
    """Some layer of the plan computes in half precision."""
    return any(p.dtype in HALF for site in plan.to_convert for p in site.module.parameters(recurse=False))


def _run_converted(
    model: nn.Module, arguments: tuple[Any, ...], plan: Plan, before: Outputs | None, replaced: Places
) -> Difference | None:
    """The difference from ``before``, where that is known. Raises ``InputError`` when a replaced layer is called.

    (Most such layers the plan has left already; a model may notice that a layer is another.)
    """
    if before is None:
        return None
    with recording(dict(replaced)) as called:
        difference = compare_with(model, arguments, plan.modes, before)
    for name in called:
        raise InputError(
            f"{name} was replaced in vain: once it was, the model called the old layer, from a list or a closure say.",
            "A layer can be replaced where only attributes of modules, nn.ModuleList and the like hold it.",
            f'nn.ModuleList(layers) in place of the list, or --exclude "{name}"',
        )
    return difference


def _plan(model: nn.Module, selection: Selection, arguments: tuple[Any, ...], variant: Variant | None) -> Plan:
    recipe = recipe_of(model)
    source = (recipe.source.name if recipe else "") or type(model).__name__
    plan = select(find_sites(model, arguments), selection, source)
    if variant is not None and variant.routing == "block":
        return share_routers(model, plan, arguments, selection.blocks)
    if selection.blocks:
        raise InputError("--block without --routing block.", "It names blocks that share a router.", "--routing block")
    return plan


def example_arguments(model: nn.Module, example: Any = None) -> tuple[Any, ...]:
    """The arguments of a forward pass: the example's, or two random pictures of the size the model expects."""
    if example is not None:
        return example if isinstance(example, tuple) else (example,)
    spec = input_spec_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, spec.channels, spec.height, spec.width, generator=generator)
    return (x.to(device_of(model), dtype),)


def _recipe_with_hash(model: nn.Module) -> Recipe:
    """What the converted model will say of its origin: taken before its weights change."""
    recipe = recipe_of(model) or Recipe(input=input_spec_of(model))
    return recipe if recipe.weights_sha256 else replace(recipe, weights_sha256=hash_weights(model))
