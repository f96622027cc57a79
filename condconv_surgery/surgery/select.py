"""Sites and a rule give a Plan: what will be converted, what will not, and why. Nothing is changed here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from condconv_surgery.errors import InputError
from condconv_surgery.layers.conv2d_subclasses import full_name, is_understood
from condconv_surgery.recipe import Selection, SharedRouter
from condconv_surgery.surgery.assumed_subclasses import require_classes, what_would_be_lost
from condconv_surgery.surgery.conv_sites import ConvSite, Sites

NOT_INCLUDED = "not matched by --include"

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

FUNCTIONAL = "F.conv2d on a parameter, in {}.forward: converted if the whole model is a torch.fx.GraphModule"


@dataclass(frozen=True)
class Skip:
    """A layer that stays as it is, and the reason in words."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every convolution of the model (and its classifier, when asked for) is in exactly one of the two lists.

    skipped: ``F.conv2d`` outside of all layers too, by the name of the parameter that it takes.
    modes, notes: as in ``Sites``. routers: those that several converted layers share (``surgery.block_routing``).
    """

    to_convert: tuple[ConvSite, ...]
    skipped: tuple[Skip, ...]
    modes: tuple[bool, ...] = (False, True)
    notes: tuple[str, ...] = ()
    routers: tuple[SharedRouter, ...] = ()


def select(found: Sites, selection: Selection, source: str = "the model") -> Plan:
    """Apply the rule. Raises ``InputError`` when it leaves nothing to convert, or names a class that is not there."""
    require_classes(selection.subclasses, found.sites)
    convolutions = [site for site in found.sites if not site.linear]
    candidates = list(convolutions)
    if selection.classifier:
        candidates.append(_classifier(found, source))
    elif not convolutions:
        raise _none_at_all(found, source)
    stem = next((site for site in convolutions if site.calls), None)
    to_convert: list[ConvSite] = []
    skipped = [Skip(name, FUNCTIONAL.format(who)) for name, who in found.functional]
    for site in candidates:
        reason = _reason_to_skip(site, selection, site is stem)
        if site.linear and reason == NOT_INCLUDED:
            raise InputError(
                f"--classifier asks for {site.name}, but --include does not match it.",
                "--include chooses among all layers, the classifier too.",
                f'--include "{site.name}" as well',
            )
        if reason:
            skipped.append(Skip(site.name, reason))
        else:
            to_convert.append(site)
    if not to_convert:
        raise _nothing_left(candidates, skipped, selection, source)
    return Plan(tuple(to_convert), tuple(skipped), found.modes, found.notes)


def _none_at_all(found: Sites, source: str) -> InputError:
    if found.functional:
        name, who = found.functional[0]
        return InputError(
            f"No convolution to convert: {source} has no nn.Conv2d, only F.conv2d with {name}, in {who}.forward.",
            "Where the whole model is a torch.fx.GraphModule those are converted too.",
            "convert(torch.fx.symbolic_trace(model), ...)",
        )
    return InputError(
        f"No convolution to convert: {source} has none.",
        "An nn.Conv2d, or the final nn.Linear with --classifier, can be converted.",
        "another model, or --classifier",
    )


def _reason_to_skip(site: ConvSite, selection: Selection, is_stem: bool) -> str:
    """Why ``site`` stays as it is; empty when it is converted. What cannot be comes before what is not wanted."""
    checks = (
        _reason_impossible(site.module, selection.subclasses),
        f"{site.tied_to} is the same parameter as one of its own, and would not be any more" if site.tied_to else "",
        f"{site.read_by} computes with its weight outside of it" if site.read_by else "",
        f"{site.bypassed_by} calls its forward directly, past its hooks (self.conv(x) in place of self.conv.forward(x) "
        "makes its calls known)"
        if site.bypassed_by
        else "",
        "called from where a replacement would not be: a list or a closure, say (nn.ModuleList(layers) in place of the "
        "list makes it known)"
        if site.held
        else "",
        "not called in a forward pass" if site.calls == 0 else "",
        NOT_INCLUDED if selection.include and not _matches(site, selection.include) else "",
        "matched by --exclude" if _matches(site, selection.exclude) else "",
        "the stem: the first convolution sees the picture, not features (--no-skip-stem converts it)"
        if selection.skip_stem and is_stem
        else "",
        "over a 1x1 map, as in squeeze-and-excite: mixing the kernels would cost more than the convolution "
        "(--no-skip-pooled converts it)"
        if selection.skip_pooled and site.pooled and not site.linear
        else "",
        _too_narrow(site.module, selection.min_channels),
    )
    return next((reason for reason in checks if reason), "")


def _reason_impossible(module: nn.Module, subclasses: tuple[str, ...]) -> str:
    cls = type(module)
    if "forward" in vars(module):
        return "its forward is its own, not that of its class (accelerate's remove_hook_from_module puts that back)"
    computed, name = _computed(module), full_name(cls)
    if computed:
        return computed
    if isinstance(module, nn.Conv2d) and not is_understood(cls) and name not in subclasses:
        return f"{name} does not compute a plain convolution, for all that is known; if it does: --subclass {name}"
    if any(getattr(module, kind) for kind in _STATE_HOOKS):
        return "hooks on its state dict (register_state_dict_pre_hook and the like) know its keys, not those of experts"
    lost = what_would_be_lost(module)
    return f"it holds more than weight and bias, which would be lost: {lost}" if lost else ""


def _computed(module: nn.Module) -> str:
    """How its weight or bias is made at each call; empty when both are parameters."""
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(module, name):
            return f"its {name} is computed by a parametrization (parametrize.remove_parametrizations makes it plain)"
        if name not in module._parameters:
            makers = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
            return (
                f"its {name} is computed by a hook ({', '.join(makers) or 'none found'}; remove_weight_norm, "
                "remove_spectral_norm or prune.remove makes it plain)"
            )
    return ""


def _too_narrow(module: nn.Module, least: int) -> str:
    widths = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else _widths(module)
    return f"{min(widths)} channels, fewer than --min-channels {least}" if min(widths) < least else ""


def _widths(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Conv2d)
    return module.in_channels, module.out_channels


def _matches(site: ConvSite, patterns: tuple[str, ...]) -> bool:
    return any(matches(name, pattern) for name in site.names for pattern in patterns)


def matches(name: str, pattern: str) -> bool:
    """``pattern`` is a glob, or ``re:`` and a regular expression, for the whole name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def _classifier(found: Sites, source: str) -> ConvSite:
    called = [site for site in found.sites if site.linear and site.calls]
    if not called:
        raise InputError(
            f"--classifier: {source} calls no nn.Linear.",
            "The classifier is the last nn.Linear of a forward pass.",
            "leave --classifier out",
        )
    return called[-1]


def _nothing_left(candidates: list[ConvSite], skipped: list[Skip], selection: Selection, source: str) -> InputError:
    matched = [site for site in candidates if not selection.include or _matches(site, selection.include)]
    if selection.include and not matched:
        flags = " ".join(f'--include "{pattern}"' for pattern in selection.include)
        given = f"{flags} matched 0 of {len(candidates)} convolutions in {source}."
    else:
        names = {site.name for site in matched}
        reasons = sorted({skip.reason for skip in skipped if skip.name in names})
        given = f"all {len(matched)} convolutions of {source} are skipped: {'; '.join(reasons)}."
    some = [site.name for site in (candidates[0], candidates[len(candidates) // 2], candidates[-1])]
    prefix = some[-1].split(".")[0]
    return InputError(
        f"No layer left to convert: {given}",
        f"They are named like: {', '.join(dict.fromkeys(some))}",
        f'--include "{prefix}*"      (or --dry-run to list them all)',
    )
