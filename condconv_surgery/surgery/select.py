"""From sites and a ``Selection`` to a Plan: which layers are converted, which are not, and why. Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from condconv_surgery.errors import InputError
from condconv_surgery.layers.conv2d_subclasses import full_name, is_understood
from condconv_surgery.recipe import LayerFilter, Selection, as_argument, matches, require_matches
from condconv_surgery.surgery.conversion_plan import Plan, Skip
from condconv_surgery.surgery.nothing_left import nothing_left
from condconv_surgery.surgery.observe.conv_sites import ConvSite, Sites
from condconv_surgery.surgery.proof.assumed_subclasses import attributes_to_lose, require_classes

NOT_INCLUDED = "not matched by include="

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

IN_ADAPTER = "inside a PEFT adapter ({}), which adds its own product to the kernel: merge first (merge_and_unload)"

FUNCTIONAL = "F.conv2d on a parameter, in {}.forward: converted if the whole model is a torch.fx.GraphModule"


def select(
    observed: Sites, selection: Selection, source: str = "the model", originals: Mapping[str, nn.Module] | None = None
) -> Plan:
    """Apply the selection. Raises ``InputError`` when no layer is left, or a class of ``subclasses`` is not there.

    source: what errors call the model. originals: modules by name, for callable filters, where sites are of a copy.
    """
    require_classes(selection.subclasses, observed.sites)
    candidates = _candidates(observed, selection, source)
    originals = originals or {}
    stem = next((site for site in candidates if not site.linear and site.calls), None)
    to_convert: list[ConvSite] = []
    skipped = [Skip(name, FUNCTIONAL.format(cls)) for name, cls in observed.functional]
    for site in candidates:
        reason = _reason_to_skip(site, selection, site is stem, originals)
        if (site.linear or (site.head and selection.classifier)) and reason == NOT_INCLUDED:
            raise InputError(
                f"classifier=True asks for {site.name}, but include= does not match it.",
                "include= chooses among all layers, the classifier too.",
                f'include=["{site.name}"] as well',
            )
        if reason:
            skipped.append(Skip(site.name, reason))
        else:
            to_convert.append(site)
    if not to_convert:
        raise nothing_left(
            candidates,
            [s for s in candidates if not selection.include or _any_matches(selection.include, s, originals)],
            _convertible_classifier(observed, selection),
            selection,
            source,
            lambda other: {site.name: _reason_to_skip(site, other, site is stem, originals) for site in candidates},
        )
    names = [*(name for site in observed.sites for name in site.names), *(name for name, _ in observed.functional)]
    require_matches("include", selection.include, names)
    require_matches("exclude", selection.exclude, names)
    return Plan(tuple(to_convert), tuple(skipped), observed.modes, observed.notes)


def _candidates(observed: Sites, selection: Selection, source: str) -> list[ConvSite]:
    convolutions = [site for site in observed.sites if not site.linear]
    if selection.classifier and not any(site.head for site in convolutions):
        return [*convolutions, _classifier(observed, source)]
    if not convolutions:
        raise _no_convolution(observed, selection, source)
    return convolutions


def _no_convolution(observed: Sites, selection: Selection, source: str) -> InputError:
    if observed.functional:
        name, cls = observed.functional[0]
        return InputError(
            f"No convolution to convert: {source} has no nn.Conv2d, only F.conv2d with {name}, in {cls}.forward.",
            "Where the whole model is a torch.fx.GraphModule those are converted too.",
            "convert(torch.fx.symbolic_trace(model), ...)",
        )
    return InputError(
        f"No convolution to convert: {source} has none.",
        "An nn.Conv2d, or the final nn.Linear with classifier=True, can be converted.",
        "another model"
        if _convertible_classifier(observed, selection) is None
        else "another model, or classifier=True",
    )


def _reason_to_skip(site: ConvSite, selection: Selection, is_stem: bool, originals: Mapping[str, nn.Module]) -> str:
    """Why ``site`` is not converted; empty when it is. What is not possible comes before what is not selected."""
    checks = (
        _reason_impossible(site.module, selection.subclasses),
        IN_ADAPTER.format(site.adapter) if site.adapter else "",
        f"{site.tied_to} is the same parameter as one of its own; they would no longer be tied" if site.tied_to else "",
        f"{site.read_by} computes with its weight outside of it" if site.read_by else "",
        f"{site.bypassed_by} calls its forward directly, past its hooks (self.conv(x) in place of self.conv.forward(x) "
        "makes its calls known)"
        if site.bypassed_by
        else "",
        "called from where it cannot be replaced: a list or a closure, say (nn.ModuleList(layers) in place of the "
        "list makes it known)"
        if site.unreachable
        else "",
        "not called in a forward pass" if site.calls == 0 else "",
        _constant(site.module),
        NOT_INCLUDED if selection.include and not _any_matches(selection.include, site, originals) else "",
        "the classifier: it gives the logits (classifier=True converts it)"
        if site.head and not selection.classifier
        else "",
        "matched by exclude=" if _any_matches(selection.exclude, site, originals) else "",
        "the stem: the first convolution sees the image, not features (skip_stem=False converts it)"
        if selection.skip_stem and is_stem
        else "",
        "over a 1x1 map, as in squeeze-and-excite: mixing the kernels would cost more than the convolution "
        "(skip_pooled=False converts it)"
        if selection.skip_pooled and site.pooled and not site.linear
        else "",
        _too_narrow(site.module, selection.min_channels),
    )
    return next((reason for reason in checks if reason), "")


def _reason_impossible(module: nn.Module, subclasses: tuple[str, ...]) -> str:
    cls = type(module)
    if "forward" in vars(module):
        return (
            "its forward was replaced on the object (accelerate's remove_hook_from_module restores that of its class)"
        )
    computed, name = _computed(module), full_name(cls)
    if computed:
        return computed
    if any(getattr(module, kind) for kind in _STATE_HOOKS):
        return "hooks on its state dict (register_state_dict_pre_hook and the like) know its keys, not those of experts"
    lost = attributes_to_lose(module)
    if isinstance(module, nn.Conv2d) and not is_understood(cls) and name not in subclasses:
        what = f"{name} does not compute a plain convolution, as far as is known"
        return (
            f"{what}, and holds more than weight and bias: {lost}"
            if lost
            else f"{what}; if it does: {as_argument('subclasses', [name])}"
        )
    return f"it holds more than weight and bias, which would be lost: {lost}" if lost else ""


def _computed(module: nn.Module) -> str:
    """How its weight or bias is computed before each call; empty when both are parameters."""
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


def _constant(module: nn.Module) -> str:
    """Why nothing in the layer is learned; empty when it is. (Frozen is not constant: published files freeze all.)"""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.shape[0] != 1 or weight.numel() < 2 or weight.is_meta:
        return ""
    bins = torch.arange(weight.numel(), dtype=weight.dtype, device=weight.device)
    return (
        f"its weight is the constant 0, 1, ..., {weight.numel() - 1}: the mean over bins of a distribution (DFL)"
        if torch.equal(weight.flatten(), bins)
        else ""
    )


def _too_narrow(module: nn.Module, min_channels: int) -> str:
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    if isinstance(module, nn.Linear):
        width = min(module.in_features, module.out_features)
    else:
        width = min(module.in_channels, module.out_channels)
    return f"{width} channels, fewer than min_channels={min_channels}" if width < min_channels else ""


def _any_matches(filters: Iterable[str | LayerFilter], site: ConvSite, originals: Mapping[str, nn.Module]) -> bool:
    return any(
        matches(name, one) if isinstance(one, str) else one(name, originals.get(name, site.module))
        for one in filters
        for name in site.names
    )


def _convertible_classifier(observed: Sites, selection: Selection) -> ConvSite | None:
    """The last ``nn.Linear``, where it is not among the candidates yet and could be converted."""
    called = [site for site in observed.sites if site.linear and site.calls]
    alone = Selection(subclasses=selection.subclasses)
    possible = bool(called) and not selection.classifier and not _reason_to_skip(called[-1], alone, False, {})
    return called[-1] if possible else None


def _classifier(observed: Sites, source: str) -> ConvSite:
    called = [site for site in observed.sites if site.linear and site.calls]
    if not called:
        raise InputError(
            f"classifier=True, but {source} calls no nn.Linear.",
            "The classifier is the last nn.Linear of a forward pass.",
            "classifier=False",
        )
    return called[-1]
