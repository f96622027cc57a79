"""``plan`` and ``convert``: the two functions, and the plan that knows its model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, fx, nn
from torch.optim import Optimizer

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import VARIANTS, LayerFilter, Selection, Upcycling, Variant, patterns_of
from condconv_surgery.runtime.modes import example_arguments
from condconv_surgery.surgery.accept_model import accept
from condconv_surgery.surgery.carry_out import Conversion, carry_out
from condconv_surgery.surgery.conversion_job import Job
from condconv_surgery.surgery.conversion_plan import Plan, plan_text
from condconv_surgery.surgery.fx_trace import Followers, trace_followers
from condconv_surgery.surgery.lift_functional import undone_on_error
from condconv_surgery.surgery.proof.assumed_subclasses import unchecked_notes
from condconv_surgery.surgery.trained_parameters import frozen_notes, hook_notes, nonfinite_notes, require_optimizers
from condconv_surgery.surgery.upcycle import start_of

Patterns = str | LayerFilter | Sequence[str | LayerFilter] | None
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, repr=False)
class ModelPlan(Plan):
    """A plan for one model: ``print`` it, then ``apply`` it."""

    job: Job = field(kw_only=True, repr=False, compare=False)

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
            return carry_out(self, job)


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
    start: str = "auto",
    spread: float = 2.0,
    calibration: Tensor | Iterable[Any] | None = None,
    diversity: float | None = None,
    seed: int = 0,
    inplace: bool = False,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    prove: bool = True,
    tolerance: float | None = None,
) -> ModelPlan:
    """Decide which layers ``convert`` replaces; nothing is changed.

        >>> import condconv_surgery as cs, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> print(cs.plan(net, cs.CondConv(experts=4), example=torch.randn(2, 3, 16, 16)))
        1 layer to convert, 1 skipped
          2  3x3 8->8  input 8x14x14  then output
        skipped 0: the stem: the first convolution sees the image, not features (skip_stem=False converts it)

    model: any ``nn.Module`` in Python. A ``torch.fx.GraphModule`` stays one, and its ``F.conv2d`` on parameters are
        converted too (``lift_convolutions``). ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` are
        taken off.
    example: an input, a tuple of all arguments, a dict of keyword arguments (``{"pixel_values": x}``), or what a
        detector takes; by default two random images of the model's own input specification, else 3x224x224.
    include, exclude: globs, ``re:`` and a regular expression, or functions ``(name, module) -> bool``.
    min_channels, skip_stem, skip_pooled, classifier, blocks, subclasses: see ``recipe.Selection``.
    start, spread, diversity, seed: see ``recipe.Upcycling``.
    calibration: 256 images or so that show the routers in which directions features vary, without labels: a tensor
        [N, C, H, W], or batches (a ``DataLoader``), alone, first in a tuple or in a dict. Without them directions are
        random.
    inplace: run and change ``model`` itself, which nothing else may use meanwhile. By default copies are run, which
        share its parameters, and a copy is converted.
    optimizers: made for ``model`` before; with ``inplace=True`` experts and routers get the parameter groups of the
        weights that they replace, without the state (momentum) of those.
    prove: run both models in both modes and compare; ``tolerance`` is absolute, in the output's units, 0 or more.

    Raises ``InputError`` when no layer is left to convert, the example does not fit or the model is not supported.
    """
    patterns, names = (patterns_of(include), patterns_of(exclude)), (patterns_of(blocks), patterns_of(subclasses))
    selection = Selection(*patterns, min_channels, skip_stem, skip_pooled, classifier, *names)
    _require_variant(variant)
    if selection.blocks and variant.routing != "block":
        fix = 'routing="block"'
        raise InputError(f"blocks= without {fix}.", "It names blocks that share a router.", fix)
    _require_tolerance(tolerance)
    known = require_optimizers(optimizers, inplace)
    inner = accept(model, inplace=inplace, prove=prove)
    wrapper = "" if inner is model else type(model).__name__
    arguments = example_arguments(inner, example)
    upcycling = Upcycling(start, spread, diversity, seed)
    if start_of(variant, upcycling) == "noise" and calibration is not None:
        raise InputError(
            'calibration= with start="noise".',
            "Images show routers that do not start at zero where to.",
            'start="auto"',
        )
    job = Job(inner, wrapper, arguments, variant, selection, upcycling, calibration, inplace, known, prove, tolerance)
    with job.running():
        made = job.decide()
    of_weights = (*nonfinite_notes(inner), *frozen_notes(inner, made.to_convert, variant), *hook_notes(made.to_convert))
    notes = (*made.notes, *unchecked_notes(made.to_convert), *of_weights, *_framework_notes(inner))
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

        W_b = sum_e gate[b,e] (W + eps_e),    sum_e gate[b,e] = 1    at the start, and
        sum_e eps_e = 0, gate = 1/n (start="noise")   or   eps = 0, any such gates (start="auto"; ``recipe.Upcycling``)

    Takes the arguments of ``plan``, and is ``plan(...).apply()``.

    Raises ``InputError`` when no layer is left to convert, the example does not fit, the model returns nothing that
    can be compared or would not call what replaces a layer; ``ProofError`` when the outputs differ, or those of a
    layer of ``subclasses`` are not a plain convolution's. The model is then as it was.
    """
    return plan(*args, **kwargs).apply()


def _framework_notes(model: nn.Module) -> tuple[str, ...]:
    """What the user must know of a framework that builds and fuses the model by itself."""
    if not type(model).__module__.startswith("ultralytics."):
        return ()
    return (
        "Ultralytics trains a plain network that it builds anew, and fuses plain convolutions only: "
        f"condconv_surgery.integrations.ultralytics keeps conditional layers in a {type(model).__name__}",
    )


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
