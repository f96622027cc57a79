"""``plan`` and ``convert``: observe, select, upcycle, swap, prove. The one orchestrator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ParamSpec, TypeVar

from torch import fx, nn

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import (
    VARIANTS,
    LayerFilter,
    Recipe,
    Selection,
    Upcycling,
    Variant,
    attach_recipe,
    patterns_of,
    recipe_of,
)
from condconv_surgery.runtime.modes import example_arguments, input_spec_of
from condconv_surgery.runtime.snapshot import preserving_random_state
from condconv_surgery.runtime.tensor_hash import hash_weights
from condconv_surgery.surgery.accept_model import accept, running_eagerly
from condconv_surgery.surgery.block_routing import share_routers
from condconv_surgery.surgery.conversion_plan import Plan, Skip, plan_text
from condconv_surgery.surgery.copy_model import (
    Places,
    copy_of,
    copy_sharing_parameters,
    copy_to_change,
    original_of,
)
from condconv_surgery.surgery.fx_trace import Followers, trace_followers
from condconv_surgery.surgery.lift_functional import lift_convolutions, undone_on_error
from condconv_surgery.surgery.observe.conv_sites import ConvSite, find_sites
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
from condconv_surgery.surgery.select import select
from condconv_surgery.surgery.swap import restore, swap

Patterns = str | LayerFilter | Sequence[str | LayerFilter] | None
P = ParamSpec("P")
R = TypeVar("R")


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


@dataclass(frozen=True)
class ModelPlan(Plan):
    """A plan for one model: ``print`` it, then ``apply`` it."""

    job: _Job = field(kw_only=True, repr=False, compare=False)

    def __str__(self) -> str:
        return plan_text(replace(self, notes=(*self.notes, *self.followers.notes())), self.followers.by_layer)

    @cached_property
    def followers(self) -> Followers:
        """What takes the output of each layer, by ``torch.fx`` where the model can be traced; run when first read."""
        with self.job.running():
            model = self.job.working_copy()
            return trace_followers(model, [model.get_submodule(site.name) for site in self.to_convert])

    def apply(self) -> Conversion:
        """Convert the model as planned. Raises as ``convert``; also ``InputError`` when its layers have changed."""
        job = self.job
        in_place_graph = job.model if job.inplace and isinstance(job.model, fx.GraphModule) else None
        with job.running(), undone_on_error(in_place_graph) if in_place_graph is not None else nullcontext():
            return _carry_out(self, job)


def plan(
    model: nn.Module,
    variant: Variant,
    *,
    example: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
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
) -> ModelPlan:
    """Decide which layers ``convert`` replaces; nothing is changed.

        >>> import condconv_surgery as cs, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> print(cs.plan(net, cs.CondConv(experts=4), example=torch.randn(2, 3, 16, 16)))
        1 layers to convert, 1 skipped
          2  3x3 8->8  input 8x14x14  then output
        skipped 0: the stem: the first convolution sees the image, not features (skip_stem=False converts it)

    model: any ``nn.Module`` in Python. A ``torch.fx.GraphModule`` stays one, and its ``F.conv2d`` on parameters are
        converted too (``lift_convolutions``). ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` are
        taken off.
    example: an input, a tuple of all arguments, or what a detector takes; by default two random images of the model's
        own input specification (3x224x224 when it has none).
    include, exclude: globs, ``re:`` and a regular expression, or functions ``(name, module) -> bool``.
    min_channels, skip_stem, skip_pooled, classifier, blocks, subclasses: see ``recipe.Selection``.
    diversity, seed: see ``recipe.Upcycling``.
    inplace: run and change ``model`` itself, which nothing else may use meanwhile. By default copies are run, which
        share its parameters, and a copy is converted.
    prove: run both models in both modes and compare; ``tolerance`` is absolute, in the output's units, 0 or more.

    Raises ``InputError`` when no layer is left to convert, the example does not fit or the model is not supported.
    """
    patterns, names = (patterns_of(include), patterns_of(exclude)), (patterns_of(blocks), patterns_of(subclasses))
    selection = Selection(*patterns, min_channels, skip_stem, skip_pooled, classifier, *names)
    _require_variant(variant)
    _require_tolerance(tolerance)
    inner = accept(model, inplace=inplace, prove=prove)
    wrapper = "" if inner is model else type(model).__name__
    arguments = example_arguments(inner, example)
    upcycling = Upcycling(diversity, seed)
    job = _Job(inner, wrapper, arguments, variant, selection, upcycling, inplace, prove, tolerance)
    with job.running():
        made = job.decide()
    notes = (*made.notes, *unchecked_notes(made.to_convert))
    return ModelPlan(made.to_convert, made.skipped, made.modes, notes, made.routers, job=job)


def _same_arguments_as(other: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Declare that a function takes the arguments of ``other``: one signature, for type checkers and ``help`` too."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        returns = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(other).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return function

    return decorate


@_same_arguments_as(plan)
def convert(*args: Any, **kwargs: Any) -> Conversion:
    """Replace the convolutions of a trained model by conditional ones that compute the same at the start.

        W_b = sum_e gate[b,e] (W + eps_e),    sum_e eps_e = 0,    gate = 1/n at the start

    Takes the arguments of ``plan``, and is ``plan(...).apply()``.

    Raises ``InputError`` when no layer is left to convert, the example does not fit, the model returns nothing that
    can be compared or would not call what replaces a layer; ``ProofError`` when the outputs differ, or those of a
    layer of ``subclasses`` are not a plain convolution's. The model is then as it was.
    """
    return plan(*args, **kwargs).apply()


@dataclass(frozen=True)
class _Job:
    """The model and what the caller of ``plan`` decided.

    model: without ``wrapper``, the class name of what was taken off ("" for none).
    """

    model: nn.Module
    wrapper: str
    arguments: tuple[Any, ...]
    variant: Variant
    selection: Selection
    upcycling: Upcycling
    inplace: bool
    prove: bool
    tolerance: float | None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all passes of the model: no compiled code, and the random state is as before afterwards."""
        with running_eagerly(self.model), preserving_random_state(self.model):
            yield

    def working_copy(self) -> nn.Module:
        """What observation and proof run: a copy that shares the parameters; the model itself with ``inplace=True``.

        Of a graph always a copy, in which functional convolutions are modules.
        """
        return self._lifted()[0]

    def decide(self) -> Plan:
        """Observe and select. Raises ``InputError`` when no layer is left to convert."""
        model, not_lifted = self._lifted()
        recipe, selection = recipe_of(model), self.selection
        source = (recipe.source.name if recipe else "") or type(model).__name__
        originals = dict(self.model.named_modules(remove_duplicate=False))
        made = select(find_sites(model, self.arguments), selection, source, originals)
        if self.variant.routing == "block":
            made = share_routers(model, made, self.arguments, selection.blocks)
        elif selection.blocks:
            fix = 'routing="block"'
            raise InputError(f"blocks= without {fix}.", "It names blocks that share a router.", fix)
        names = {skip.name for skip in not_lifted}
        return replace(made, skipped=(*(skip for skip in made.skipped if skip.name not in names), *not_lifted))

    def _lifted(self) -> tuple[nn.Module, tuple[Skip, ...]]:
        if not isinstance(self.model, fx.GraphModule):
            return (self.model if self.inplace else copy_sharing_parameters(self.model)), ()
        graph = copy_sharing_parameters(self.model)
        return graph, self.lift(graph)

    def lift(self, graph: nn.Module) -> tuple[Skip, ...]:
        """Make modules of functional convolutions, in place; returns those that could not be."""
        assert isinstance(graph, fx.GraphModule)
        not_lifted = lift_convolutions(graph)
        has_convolution = any(isinstance(module, nn.Conv2d) for module in graph.modules())
        if not_lifted and not self.selection.classifier and not has_convolution:
            raise InputError(
                f"No convolution to convert: {not_lifted[0].reason}.",
                "F.conv2d becomes a module where its weight is a parameter that nothing else uses, in equal calls.",
                "another model, or classifier=True",
            )
        return not_lifted

    def target(self, model: nn.Module, made: Plan) -> nn.Module:
        """The module tree to convert. model: the working copy."""
        if not self.inplace:
            return copy_to_change(model, made)
        if isinstance(self.model, fx.GraphModule):
            self.lift(self.model)
        return self.model


def _carry_out(planned: ModelPlan, job: _Job) -> Conversion:
    model = job.working_copy()
    unchecked = unchecked_notes(planned.to_convert)
    notes = tuple(note for note in planned.notes if not job.prove or note not in unchecked)
    sites = tuple(_site_in(model, site) for site in planned.to_convert)
    made = Plan(sites, planned.skipped, planned.modes, notes, planned.routers)
    before = None
    if job.prove:
        with checking_subclasses(made.to_convert):
            before = replace(run_both_modes(model, job.arguments, made.modes), half=_computes_in_half(made))
        made = replace(made, notes=(*made.notes, *require_tensors(before)))
    recipe = _recipe_with_hash(model)
    target = job.target(model, made)
    change = partial(swap, plan=made, variant=job.variant, upcycling=job.upcycling)
    replaced = change(target)
    try:
        original = partial(original_of, target, made, replaced) if target is model else partial(copy_of, model)
        difference, in_float64, note = _prove(target, original, job, made, before, replaced, change)
    except Exception:
        restore(target, made, replaced)
        raise
    attach_recipe(target, recipe)
    if job.wrapper:
        note = (*note, f"{job.wrapper} taken off: wrap the converted model again")
    return Conversion(target, replace(made, notes=(*made.notes, *note)), difference, in_float64)


def _site_in(model: nn.Module, site: ConvSite) -> ConvSite:
    """The site with its layer in ``model``. Raises ``InputError`` when that is another than was planned."""
    module = dict(model.named_modules(remove_duplicate=False)).get(site.name)
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
    job: _Job,
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
    parameters = sum(parameter.numel() for parameter in target.parameters())
    note, exact = explain_difference(make_original, job.arguments, made, change, parameters, before, difference)
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


def _computes_in_half(made: Plan) -> bool:
    """Some layer of the plan computes in half precision."""
    return any(p.dtype in HALF for site in made.to_convert for p in site.module.parameters(recurse=False))


def _recipe_with_hash(model: nn.Module) -> Recipe:
    """The recipe with the hash of the original weights, so taken before they change."""
    recipe = recipe_of(model) or Recipe(input=input_spec_of(model))
    return recipe if recipe.weights_sha256 else replace(recipe, weights_sha256=hash_weights(model))


def _require_variant(variant: object) -> None:
    if not isinstance(variant, Variant) or type(variant) is Variant:
        known = ", ".join(f"{cls.__name__}()" for cls in VARIANTS.values())
        raise InputError(
            f"convert was given the variant {variant!r}.",
            f"It takes an object: one of {known}.",
            "convert(model, CondConv(experts=4))",
        )


def _require_tolerance(tolerance: object) -> None:
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance >= 0):
        raise InputError(f"tolerance is {tolerance!r}.", "It must be a number, 0 or more.", "tolerance=1e-4")
