"""The model and options of one conversion: what ``plan`` decides from, and what ``carry_out`` works with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.optim import Optimizer

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import Selection, Upcycling, Variant, recipe_of
from condconv_surgery.runtime.snapshot import preserving_random_state
from condconv_surgery.surgery.accept_model import running_eagerly
from condconv_surgery.surgery.block_routing import share_routers
from condconv_surgery.surgery.conversion_plan import Plan, Skip
from condconv_surgery.surgery.copy_model import copy_sharing_parameters, copy_to_change
from condconv_surgery.surgery.lift_functional import lift_convolutions
from condconv_surgery.surgery.observe.conv_sites import find_sites
from condconv_surgery.surgery.observe.pooled_features import calibration_batches, pooled_features
from condconv_surgery.surgery.select import select
from condconv_surgery.surgery.upcycle import start_of


@dataclass(frozen=True)
class Job:
    """The model and what the caller of ``plan`` decided.

    model: without ``wrapper``, the class name of what was taken off ("" for none).
    """

    model: nn.Module
    wrapper: str
    arguments: tuple[Any, ...]
    variant: Variant
    selection: Selection
    upcycling: Upcycling
    calibration: Tensor | Iterable[Any] | None
    inplace: bool
    optimizers: tuple[Optimizer, ...]
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
        names = {skip.name for skip in not_lifted}
        return replace(made, skipped=(*(skip for skip in made.skipped if skip.name not in names), *not_lifted))

    def _lifted(self) -> tuple[nn.Module, tuple[Skip, ...]]:
        if not isinstance(self.model, fx.GraphModule):
            return (self.model if self.inplace else copy_sharing_parameters(self.model)), ()
        graph = copy_sharing_parameters(self.model)
        return graph, self._lift(graph)

    def _lift(self, graph: nn.Module) -> tuple[Skip, ...]:
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

    def features(self, model: nn.Module, made: Plan) -> dict[str, Tensor]:
        """The pooled features from which routers start, by layer or block. model: the working copy."""
        zeroed = self.variant.experts == 1 or start_of(self.variant, self.upcycling) == "noise"
        if zeroed or any(parameter.is_meta for parameter in model.parameters()):
            return {}
        shared = {name for router in made.routers for name in router.layers}
        routed = {site.name: site.module for site in made.to_convert if site.name not in shared}
        routed |= {router.block: model.get_submodule(router.block) for router in made.routers}
        images = self.calibration
        batches = [self.arguments] if images is None else calibration_batches(model, images)
        return pooled_features(model, routed, batches, training=False not in made.modes)

    def target(self, model: nn.Module, made: Plan) -> nn.Module:
        """The module tree to convert. model: the working copy."""
        if not self.inplace:
            return copy_to_change(model, made)
        if isinstance(self.model, fx.GraphModule):
            self._lift(self.model)
        return self.model
