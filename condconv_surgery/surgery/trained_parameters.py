"""What training knows of replaced layers: optimizers made before an in-place conversion, and frozen weights."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from condconv_surgery.errors import InputError, counted, listed
from condconv_surgery.layers.routed_block import ROUTER
from condconv_surgery.recipe import Variant
from condconv_surgery.surgery.conversion_plan import Plan
from condconv_surgery.surgery.copy_model import Places
from condconv_surgery.surgery.observe.conv_sites import ConvSite


def require_optimizers(optimizers: Optimizer | Sequence[Optimizer], inplace: bool) -> tuple[Optimizer, ...]:
    """``optimizers=`` as a tuple. Raises ``InputError`` for other objects, and without ``inplace=True``."""
    given = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
    for optimizer in given:
        if not isinstance(optimizer, Optimizer):
            raise InputError(
                f"optimizers= holds a {type(optimizer).__name__}.",
                "It takes optimizers of torch.optim that were made for the model.",
                "optimizers=[optimizer]",
            )
    if given and not inplace:
        raise InputError(
            "optimizers= without inplace=True.",
            "The converted model is a copy, whose parameters no earlier optimizer holds.",
            "inplace=True, or make the optimizer from conversion.model.parameters()",
        )
    return given


def frozen_notes(model: nn.Module, sites: Sequence[ConvSite], variant: Variant) -> tuple[str, ...]:
    """A note where parameters do not require gradients: nor will their experts and routers, and no file keeps it."""
    of_files = "a file does not keep requires_grad: freeze them again after load"
    frozen = [site for site in sites if not site.module.weight.requires_grad]
    if frozen:
        experts = counted(len(frozen) * variant.experts, "expert")
        return (
            f"{len(frozen)} of {len(sites)} layers to convert are frozen (requires_grad=False), so their {experts} and "
            f"routers are frozen too: requires_grad_(True) on a layer lets it learn; {of_files}",
        )
    parameters = list(model.parameters())
    count = sum(not parameter.requires_grad for parameter in parameters)
    return (f"{count} of {len(parameters)} parameters are frozen; {of_files}",) if count else ()


@torch.no_grad()  # weights made in inference mode
def nonfinite_notes(model: nn.Module) -> tuple[str, ...]:
    """A note where weights or statistics of the model are NaN or infinite: equal NaN are no proof."""
    statistics = [pair for pair in model.named_buffers() if pair[0].endswith(("running_mean", "running_var"))]
    tensors: dict[str, Tensor] = dict([*model.named_parameters(), *statistics])
    bad = [name for name, tensor in tensors.items() if not (tensor.is_meta or bool(tensor.isfinite().all()))]
    if not bad:
        return ()
    return (f"NaN or infinite values, which stay in the converted model, are in {listed(bad)}",)


def hook_notes(sites: Sequence[ConvSite]) -> tuple[str, ...]:
    """A note where a weight to be converted has hooks of its own (``register_hook``): its experts have none."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooked = [site.name for site in sites if any(getattr(site.module.weight, kind, None) for kind in kinds)]
    if not hooked:
        return ()
    return (
        f"hooks on the weight of {listed(hooked)} are not on its experts: register them again, on the weight "
        "[E, O, I, k, k] of the converted layer",
    )


def hand_over(optimizers: Iterable[Optimizer], model: nn.Module, plan: Plan, replaced: Places) -> None:
    """Put experts and routers into the parameter groups of the weights that they replace, in place.

    Each group keeps its options and the order of its parameters; state of replaced parameters (momentum) is dropped,
    since experts are other tensors of another shape.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    successors = _successors(model, plan, replaced)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = group["params"]
            known = group.get("param_names", [""] * len(held))
            pairs = [
                (parameter, name if parameter is old else names[id(parameter)])
                for old, name in zip(held, known, strict=True)
                for parameter in successors.get(id(old), [old])
            ]
            for old in held:
                if id(old) in successors:
                    optimizer.state.pop(old, None)
            held[:] = [parameter for parameter, _ in pairs]  # some optimizers hold the list itself
            if "param_names" in group:
                group["param_names"][:] = [name for _, name in pairs]


def unaware_notes(replaced: Places) -> tuple[str, ...]:
    """A note for optimizers anywhere in the process that still hold a replaced parameter."""
    old = {id(parameter) for _, module in replaced for parameter in module.parameters(recurse=False)}
    unaware = [
        type(candidate).__name__
        for candidate in gc.get_referrers(*_with_subclasses(Optimizer))  # an object refers to its class
        if issubclass(type(candidate), Optimizer)
        and any(id(parameter) in old for group in candidate.param_groups for parameter in group["params"])
    ]
    if not unaware:
        return ()
    return (
        f"an optimizer ({', '.join(sorted(unaware))}) holds weights that were replaced, not their experts and routers: "
        "convert with optimizers=[...], or make it again",
    )


def _with_subclasses(kind: type[object]) -> Iterator[type[object]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _with_subclasses(subclass)


def _successors(model: nn.Module, plan: Plan, replaced: Places) -> dict[int, list[nn.Parameter]]:
    """The parameters in the place of each replaced one, by its identity. Routers, of blocks too, go with the weight."""
    successors: dict[int, list[nn.Parameter]] = {}
    routers = {shared.layers[0]: model.get_submodule(f"{shared.block}.{ROUTER}") for shared in plan.routers}
    modules = dict(replaced)
    for site in plan.to_convert:
        layer = model.get_submodule(site.name)
        new = dict(layer.named_parameters())
        if site.name in routers:
            new |= dict(routers[site.name].named_parameters(prefix=ROUTER))
        for name, old in modules[site.name].named_parameters(recurse=False):
            successors[id(old)] = [new.pop(name)] if name == "bias" else []
        successors[id(modules[site.name].weight)] = list(new.values())
    return successors
