"""``collapse``: back to a plain network, with one kernel for each layer: that of its mean mixture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.deployment_images import deployment_images
from condconv_surgery.deploy.mean_mixtures import Labelled, MeanMixture, mean_mixtures, top1
from condconv_surgery.errors import InputError, listed
from condconv_surgery.layers import ConditionalConv2d, RoutedBlock, plain_like
from condconv_surgery.layers.find_layers import folded_layers, named_layers, require_exact_experts, routed_layers
from condconv_surgery.layers.routed_block import remove_block_router
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import attach_recipe, matches, patterns_of, recipe_of, require_matches
from condconv_surgery.runtime.wrappers import unwrapped
from condconv_surgery.surgery.copy_model import copy_of
from condconv_surgery.surgery.upcycle import move_hooks


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of a conditional layer.

    router: the layer or block whose router it uses. variation: how much its kernel differs between images, relative to
    its mean. kept: why it stays conditional; empty when it becomes plain.
    """

    name: str
    router: str
    variation: float
    kept: str = ""


@dataclass(frozen=True)
class Collapse:
    """What ``collapse`` did, or would do.

    model: of the original's class, in eval mode; ``None`` after a dry run. layers: by falling variation.
    before, after: top-1, 0 to 1, of the conditional and of the collapsed network; ``None`` without labels.
    scored_on: the images of that accuracy, as text, with a warning where the model may have been trained on them.
    """

    model: nn.Module | None = field(repr=False)
    layers: tuple[LayerPlan, ...]
    before: float | None
    after: float | None
    scored_on: str = ""


def collapse(
    model: nn.Module,
    data: str | Path | Tensor | Iterable[Any],
    *,
    keep: int | Sequence[str] = (),
    max_drop: float | None = None,
    limit: int = 1000,
    inplace: bool = False,
    dry_run: bool = False,
) -> Collapse:
    """Replace each conditional layer by a plain one, whose kernel is that of the mean mixture over images.

        collapsed = cs.collapse(model, "photos")
        plain.load_state_dict(collapsed.model.state_dict())       # plain: the untouched original class

        W = out_scale * in_scale * spatial * sum_e gate[e] W_e,    each of them its mean over the images

    data: a folder of images, with ``train`` and ``val`` or without, or the directory of a run, or a tensor
        [N, C, H, W], or batches of images, alone or with labels (a ``DataLoader``). Of a folder the training images
        give the means, and the validation images the accuracy, where the folder's classes are the model's. A folder
        without such parts gives both: its accuracy may be that of images that the model was trained on.
    keep: how many routers stay conditional, those whose kernels vary most between images; or patterns of layer names.
    max_drop: points of top-1 that may be lost; as few routers as that takes stay conditional.
    limit: most validation images, equally many of each class.
    inplace: change ``model`` itself instead of a copy. dry_run: change nothing, and measure the same.

    A network that was converted and never trained collapses to the original. Raises ``InputError`` for a model without
    conditional layers or a folded one, and for data that cannot be used.
    """
    model = unwrapped(model)
    require_collapsible(model)
    keep = keep if isinstance(keep, int) else patterns_of(keep)
    _require_options(model, keep, max_drop)
    calibration, labelled, scored_on = deployment_images(model, data, limit)
    means = mean_mixtures(model, calibration)
    before = top1(model, labelled)
    layers = _plan(model, means, keep, max_drop, before, labelled)
    frozen = {layer.router for layer in layers if not layer.kept}
    if dry_run:
        return Collapse(None, layers, before, top1(model, labelled, frozen, means), scored_on)
    plain = model if inplace else copy_of(model)
    make_plain(
        plain, {name: mean.mixture for name, mean in means.items()}, {layer.name for layer in layers if not layer.kept}
    )
    plain.eval()
    return Collapse(plain, layers, before, top1(plain, labelled), scored_on)


def mean_kernel(layer: ConditionalConv2d[Any], mixture: Mixture) -> tuple[Tensor, Tensor | None]:
    """Kernel [O, I/G, kh, kw] and bias [O] of the layer under one mixture (batch 1), in float64."""
    g = layer.geometry
    gate, spatial, in_scale, out_scale = (None if part is None else part[0] for part in mixture)
    experts = layer.weight.detach().double()
    gate = experts.new_ones(1) if gate is None else gate.to(experts)
    kernel = torch.tensordot(gate, experts, 1)
    if spatial is not None:
        kernel = kernel * spatial.to(kernel)
    if in_scale is not None:  # filter o of group k sees the input channels of group k
        rows = in_scale.to(kernel).view(g.groups, 1, -1).expand(-1, g.out_channels // g.groups, -1)
        kernel = kernel * rows.reshape(g.out_channels, -1)[:, :, None, None]
    if out_scale is not None:
        kernel = kernel * out_scale.to(kernel)[:, None, None, None]
    return kernel, None if layer.bias is None else gate @ layer.bias.detach().double()


def require_collapsible(model: nn.Module) -> None:
    """Raise ``InputError`` for a model without conditional layers, or a folded one."""
    if not named_layers(model, ConditionalConv2d):
        raise InputError("The model has no conditional layer.", "It is plain already.", "use it as it is")
    require_exact_experts(model, "The plain layers get the exact mean of their experts.")
    if folded := folded_layers(model):
        raise InputError(
            f"The model is folded: {listed(folded)} took in the batch norm behind.",
            "The original class has its batch norms.",
            "the artifact from before it was folded",
        )


def _require_options(model: nn.Module, keep: int | Sequence[str], max_drop: float | None) -> None:
    names = [name for layers in named_layers(model, ConditionalConv2d) for name in layers[0]]
    if isinstance(keep, int):
        if keep < 0:
            raise InputError(f"keep={keep}.", "It is a number of routers, or names of layers.", "keep=3")
        keep = ()
    require_matches("keep", keep, names)
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise InputError(f"max_drop={max_drop}.", "It is in points of top-1, 0 to 100.", "max_drop=0.2")


def _plan(
    model: nn.Module,
    means: dict[str, MeanMixture],
    keep: int | Sequence[str],
    max_drop: float | None,
    before: float | None,
    labelled: Sequence[Labelled],
) -> tuple[LayerPlan, ...]:
    by_router = routed_layers(model)
    reasons = {name: _reason_to_stay(layers, means[name].mixture) for name, layers in by_router.items()}
    first_names = {id(layer): names for names, layer in named_layers(model, ConditionalConv2d)}
    for name, layers in by_router.items():
        for pattern in () if isinstance(keep, int) else keep:
            if not reasons[name] and any(matches(own, pattern) for one in layers for own in first_names[id(one)]):
                reasons[name] = f'matched by keep="{pattern}"'
    ranked = sorted((name for name in by_router if not reasons[name]), key=lambda name: -means[name].variation)
    if isinstance(keep, int):
        reasons |= dict.fromkeys(ranked[:keep], f"among the {keep} that vary most")
        ranked = ranked[keep:]
    if max_drop is not None:
        if before is None:
            raise InputError(
                "max_drop= needs the accuracy, and no labels are known.",
                "The classes of the folder must be those of the model; batches must hold labels.",
                "keep= instead",
            )
        count = _fewest(lambda k: top1(model, labelled, ranked[k:], means), before - max_drop / 100, len(ranked))
        reasons |= dict.fromkeys(ranked[:count], f"needed to lose at most {max_drop:g} points of top-1")
    return tuple(
        LayerPlan(first_names[id(layer)][0], name, means[name].variation, reasons[name])
        for name in sorted(by_router, key=lambda name: -means[name].variation)
        for layer in by_router[name]
    )


def _fewest(accuracy: Any, least: float, most: int) -> int:
    """The smallest count, up to ``most``, with ``accuracy(count) >= least``, by bisection."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if accuracy(middle) >= least - 1e-9 else (middle + 1, high)
    return low


def _reason_to_stay(layers: Sequence[ConditionalConv2d[Any]], mixture: Mixture) -> str:
    scaled = any(part is not None for part in mixture[1:])
    if scaled and any(layer.standardisation is not None for layer in layers):
        return "its kernel is standardised before ODConv's scales, which a plain layer of its class cannot hold"
    return ""


@torch.no_grad()
def make_plain(model: nn.Module, mixtures: dict[str, Mixture], chosen: set[str]) -> None:
    """Replace the ``chosen`` layers by plain ones, each with the kernel of its router's mixture, in place."""
    of_layer = {id(layer): mixtures[name] for name, layers in routed_layers(model).items() for layer in layers}
    for names, layer in named_layers(model, ConditionalConv2d):
        if names[0] in chosen:
            plain = _plain(layer, of_layer[id(layer)])
            move_hooks(layer, plain)
            for name in names:
                model.set_submodule(name, plain)
    for block in [module for module in model.modules() if isinstance(module, RoutedBlock)]:
        if not any(isinstance(module, ConditionalConv2d) for module in block.modules()):
            remove_block_router(block)
    recipe = recipe_of(model)
    if recipe is not None:  # save takes the layers from the modules; the weights are no longer the original ones
        attach_recipe(model, replace(recipe, weights_sha256=""))


def _plain(layer: ConditionalConv2d[Any], mixture: Mixture) -> nn.Conv2d | nn.Linear:
    module = plain_like(layer)
    kernel, bias = mean_kernel(layer, mixture)
    trained = layer.weight.requires_grad
    module.weight = nn.Parameter(kernel.to(layer.weight).reshape(module.weight.shape), requires_grad=trained)
    if bias is not None and layer.bias is not None:
        module.bias = nn.Parameter(bias.to(layer.bias), requires_grad=layer.bias.requires_grad)
    if layer.standardisation is not None and layer.standardisation.gain is not None:
        gain = layer.standardisation.gain.detach().clone()
        module.gain = nn.Parameter(gain.view_as(module.gain), requires_grad=trained)  # type: ignore[arg-type]
    return module
