"""Find the architecture of weights whose stem, head or module names are not the architecture's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor

from condconv_surgery.models.artifact.meta_init import build_on_meta
from condconv_surgery.models.checkpoints.outer_layers import Shapes, body_fits, outer_layers, shapes_of
from condconv_surgery.models.checkpoints.recognise_architecture import families_of, variations
from condconv_surgery.models.checkpoints.state_names import as_children, fitting_names, parts_of, without_inner_wrappers
from condconv_surgery.recipe import Source


def recognise_body(state: dict[str, Tensor], library: str, *, beside: bool = True) -> Source | None:
    """The one classifier of torchvision or timm whose tensors are all in ``state``, but for its stem and head.

    Under any prefix that a quarter of the tensors have; torchvision's also as the children of an ``nn.Sequential``.
    beside: tensors of modules that it does not have may stand beside them, under the same prefix.
    """
    state = without_inner_wrappers(state)
    for part in (fitting_names(state), *parts_of(state)):
        found = list(_matches(library, shapes_of(part), beside))
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _matches(library: str, own: Shapes, beside: bool) -> Iterator[Source]:
    for names in filter(None, families_of(library).values()):
        shapes = own
        if library == "torchvision" and all(name.partition(".")[0].isdigit() for name in own):
            shapes = as_children(own, _children(names[0]))
        tops = {name.partition(".")[0] for name in shapes}
        if not any(_body_tops(first) <= tops for _, first in variations(library, names[0])):
            continue
        for name in names:
            fitting = (
                source
                for source, network in variations(library, name)
                if body_fits(network, shapes) and (beside or tops <= {key.partition(".")[0] for key in network})
            )
            if source := next(fitting, None):
                yield source


def _body_tops(network: Shapes) -> set[str]:
    outer = outer_layers(network)
    tops = {name.partition(".")[0] for name in network if not name.lower().startswith("aux")}
    return tops if outer is None else tops - {outer.group.removesuffix(".")}


@functools.cache
def _children(name: str) -> tuple[str, ...]:
    return tuple(child for child, _ in build_on_meta(Source(f"torchvision:{name}")).named_children())
