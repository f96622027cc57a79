"""``fold``: the inference form of a conditional network, without the batch norms behind its conditional layers.

For a batch norm with the running mean m and variance v behind a conditional convolution,

    s = gamma / sqrt(v + eps)
    s * (out_scale_b * conv(in_scale_b * x_b, W_b) + bias_b - m) + beta
        = out_scale_b * conv(in_scale_b * x_b, s * W_b) + s * bias_b + (beta - s * m)

so every expert and every expert's bias is scaled by s for each filter, and what is left is one bias that no gate
weighs: sigmoid gates need not sum to 1. ODConv's filter attention (out_scale) multiplies as s does, in any order.

The normalisation of the gates (2/n of CondConv's sigmoids, 2 of each of ODConv's scales; softmax gates have none) could
go into the experts as well, exactly. It stays in the router, where it is an argument of one call and takes no time:
then the folded file has the layers and routers of any other. ``export`` moves it (``compact_routers``), since there it
is an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.batch_norm_pairs import ACTIVATED_NORM, Pair, batch_norm_pairs
from condconv_surgery.errors import InputError, ProofError, listed
from condconv_surgery.layers import ConditionalConv2d, conditional_layers
from condconv_surgery.layers.conv2d_subclasses import full_name
from condconv_surgery.layers.find_layers import folded_layers, require_exact_experts
from condconv_surgery.runtime.modes import example_arguments, restore_modes
from condconv_surgery.runtime.wrappers import unwrapped
from condconv_surgery.surgery.conversion_plan import Skip
from condconv_surgery.surgery.copy_model import copy_of
from condconv_surgery.surgery.proof.compare_outputs import Gap, allowed, compare, exceeds, run_both_modes
from condconv_surgery.surgery.proof.rounding_error import difference_in_float64, fits_in_float64


@dataclass(frozen=True)
class Folding:
    """What ``fold`` did.

    model: in eval mode, of the original's own class. folded: each layer and the batch norm that went into it.
    skipped: the conditional layers that are as they were, and why.
    difference: the proof that it computes the same; ``None`` with ``prove=False``. difference_float64: the same in
    float64, run only where float32 leaves doubt.
    """

    model: nn.Module = field(repr=False)
    folded: tuple[Pair, ...]
    skipped: tuple[Skip, ...]
    difference: Gap | None
    difference_float64: Gap | None = None


def fold(
    model: nn.Module,
    *,
    example: Any = None,
    inplace: bool = False,
    prove: bool = True,
    tolerance: float | None = None,
) -> Folding:
    """Fold the batch norm behind each conditional convolution into its experts and one bias, exactly.

        folding = cs.fold(model)
        cs.save(folding.model, "folded.safetensors")

    The result is for inference: the outputs in eval mode are equal up to rounding, and ``finetune`` refuses it. A batch
    norm that other outputs pass too, or that is not traced, stays, and ``skipped`` says why. Plain convolutions stay as
    they are: every runtime folds those.

    example: an input for the proof; by default two random images of the size that the model expects.
    inplace: change ``model`` itself instead of a copy; float64 then decides nothing.
    tolerance: the largest difference that the proof allows; by default 1e-4 of the outputs' magnitude, in float64 where
        the model amplifies the rounding of float32.

    Raises ``InputError`` for a model without conditional layers, or one that is folded already, and ``ProofError`` when
    the outputs differ by more than the tolerance: ``model`` is then as it was.
    """
    model = unwrapped(model)
    _require_foldable(model)
    arguments = example_arguments(model, example)
    before = run_both_modes(model, arguments, (False,)) if prove else None
    folded = model if inplace else copy_of(model)
    undo: list[Callable[[], None]] = []
    pairs, skipped = _fold_all(folded, undo if inplace and prove else None)
    if before is None:
        return Folding(folded, tuple(pairs), tuple(skipped), None)
    difference = compare(before, run_both_modes(folded, arguments, (False,)))
    if not exceeds(difference, before, tolerance):
        return Folding(folded, tuple(pairs), tuple(skipped), difference.eval)
    exact = None if inplace or tolerance is not None else _gap_in_float64(model, arguments)
    if exact is None:
        for step in reversed(undo):
            step()
        raise ProofError(
            f"The folded model differs from the original by {difference.eval.absolute if difference.eval else 0:.3g}.",
            f"At most {allowed(before.eval or [], tolerance, before.half):.3g} is allowed. Either tracing does not see "
            "each use of a layer, or the model amplifies rounding.",
            f"serve the model as it is, or {'inplace=False: float64 then decides' if inplace else 'tolerance='}",
        )
    return Folding(folded, tuple(pairs), tuple(skipped), difference.eval, exact)


def _fold_all(model: nn.Module, undo: list[Callable[[], None]] | None = None) -> tuple[list[Pair], list[Skip]]:
    """In place. What was folded, and what was not. undo: gets the steps back, for which it holds copies of experts."""
    if undo is not None:
        undo.append(partial(restore_modes, [(module, module.training) for module in model.modules()]))
    model.eval()  # returns None where a model's own train() does
    pairs, skipped = batch_norm_pairs(model)
    for pair in pairs:
        if undo is not None:
            undo.append(_undo_of(model, pair))
        _fold_pair(model, pair)
    return pairs, skipped


def _undo_of(model: nn.Module, pair: Pair) -> Callable[[], None]:
    """What takes ``_fold_pair`` back, bit for bit."""
    layer, norm = cast("ConditionalConv2d[Any]", model.get_submodule(pair.layer)), model.get_submodule(pair.norm)
    kept = [(value, value.detach().clone()) for value in (layer.weight, layer.bias) if value is not None]
    names = _names_of(model, norm)

    @torch.no_grad()
    def undo() -> None:
        for value, before in kept:
            value.copy_(before)
        layer.ungated_bias = None
        for name in names:
            model.set_submodule(name, norm)

    return undo


def _gap_in_float64(model: nn.Module, arguments: tuple[Any, ...]) -> Gap | None:
    """The difference that folding makes in float64; ``None`` where it is too large, or the model does not run in it."""
    if not fits_in_float64(model):
        return None
    found = difference_in_float64(copy_of(model), arguments, (False,), _fold_all)
    if found is None:
        return None
    difference, before = found
    return None if exceeds(difference, before, None) else difference.eval


def _require_foldable(model: nn.Module) -> None:
    if not conditional_layers(model):
        raise InputError(
            "The model has no conditional layer.",
            "Batch norms behind plain convolutions are folded by every runtime.",
            "convert(model, CondConv(experts=4))",
        )
    require_exact_experts(model, "Folding scales the experts before they are rounded.")
    if folded := folded_layers(model):
        raise InputError(f"The model is folded already: {listed(folded)}.", "Once is enough.", "use it as it is")


@torch.no_grad()
def fold_norm(layer: ConditionalConv2d[Any], norm: nn.Module) -> None:
    """Fold a batch norm in eval mode into the layer before it, in place; the caller takes the norm away."""
    scale, shift = scale_and_shift(norm)
    weight, bias = layer.weight, layer.bias
    weight.copy_(weight.double() * scale[:, None, None, None])
    if bias is not None:
        bias.copy_(bias.double() * scale)
    layer.ungated_bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def _fold_pair(model: nn.Module, pair: Pair) -> None:
    norm = model.get_submodule(pair.norm)
    fold_norm(cast("ConditionalConv2d[Any]", model.get_submodule(pair.layer)), norm)
    for name in _names_of(model, norm):
        model.set_submodule(name, _rest_of(norm))


def _names_of(model: nn.Module, wanted: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules(remove_duplicate=False) if module is wanted]


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``gamma / sqrt(v + eps)`` and ``beta - m * gamma / sqrt(v + eps)`` of a batch norm in eval mode: [O], float64."""
    values: Any = norm
    mean, variance = values.running_mean.double(), values.running_var.double()
    scale = (variance + values.eps).rsqrt()
    scale = scale if values.weight is None else scale * values.weight.double()
    shift = -mean * scale
    return scale, shift if values.bias is None else shift + values.bias.double()


def _rest_of(norm: nn.Module) -> nn.Module:
    """What is left of a batch norm without its scale and shift."""
    if full_name(type(norm)) != ACTIVATED_NORM:
        return nn.Identity().eval()
    rest = nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return rest.eval()
