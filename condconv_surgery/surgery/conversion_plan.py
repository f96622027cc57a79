"""A Plan: which layers are converted, which are not and why; as text it has one line per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from condconv_surgery.errors import counted, listed
from condconv_surgery.recipe import SharedRouter
from condconv_surgery.surgery.observe.conv_sites import ConvSite


@dataclass(frozen=True)
class Skip:
    """A layer that is not converted, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """Every convolution of the model (and its classifier, when asked for) is in exactly one of the two lists.

    to_convert: in the order of their first calls.
    skipped: also each parameter that ``F.conv2d`` takes outside of all layers, by its name.
    modes: those in which the model runs on the example, ``False`` for eval and ``True`` for train.
    notes: what could not be run, compared or seen, one line each.
    routers: those that several converted layers share (``routing="block"``).
    """

    to_convert: tuple[ConvSite, ...]
    skipped: tuple[Skip, ...]
    modes: tuple[bool, ...] = (False, True)
    notes: tuple[str, ...] = ()
    routers: tuple[SharedRouter, ...] = ()

    def __str__(self) -> str:
        return plan_text(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {_headline(self)}>"


def plan_text(plan: Plan, followed_by: Mapping[str, tuple[str, ...]] | None = None) -> str:
    """One line per layer to convert, then one per reason to skip layers, then the notes.

    followed_by: what takes the output of each layer (``fx_trace.trace_followers``), shown where known.
    """
    lines = [_headline(plan)]
    rows = [_row(site, plan, followed_by or {}) for site in plan.to_convert]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for reason in dict.fromkeys(skip.reason for skip in plan.skipped):
        names = [skip.name for skip in plan.skipped if skip.reason == reason]
        lines.append(f"skipped {listed(names)}: {reason}")
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _headline(plan: Plan) -> str:
    count = len(plan.to_convert)
    return f"{counted(count, 'layer')} to convert, {len(plan.skipped)} skipped"


def _row(site: ConvSite, plan: Plan, followed_by: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    block = next((router.block for router in plan.routers if site.name in router.layers), "")
    details = (
        f"called {site.calls} times" if site.calls > 1 else "",
        f"router of {block}" if block else "",
        f"then {', '.join(followed_by[site.name])}" if followed_by.get(site.name) else "",
    )
    shape = "x".join(map(str, site.input[1:])) if site.input else ""
    return (site.name, geometry_text(site.module), f"input {shape}", ", ".join(filter(None, details)))


def geometry_text(layer: nn.Module) -> str:
    """Kind, kernel, channels and stride of a layer: ``depthwise 3x3 64->64 /2``."""
    if isinstance(layer, nn.Linear):
        return f"linear {layer.in_features}->{layer.out_features}"
    assert isinstance(layer, nn.Conv2d)
    kind = "depthwise " if 1 < layer.groups == layer.in_channels else f"{layer.groups} groups " * (layer.groups > 1)
    stride = "" if set(layer.stride) == {1} else f" /{'x'.join(map(str, dict.fromkeys(layer.stride)))}"
    return f"{kind}{'x'.join(map(str, layer.kernel_size))} {layer.in_channels}->{layer.out_channels}{stride}"
