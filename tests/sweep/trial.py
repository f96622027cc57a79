"""One model: convert, compare, save, take a step; load in another process. What came of it is a ``Row``."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import condconv_surgery as cs
from condconv_surgery.layers import conditional_layers
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.surgery.proof.rounding_error import fits_in_float64
from tests.sweep.model_list import Case, inputs_of

EXPERTS = 2

ARTIFACT, OUTPUTS = "model.safetensors", "outputs.pt"

DOUBTFUL = 1e-4
"""A relative difference that more than rounding may have caused."""


@dataclass(frozen=True)
class Row:
    """What came of one model.

    input: shape of the first argument. skipped: how many convolutions for each reason. eval, train: the largest
    difference between original and converted, relative to the largest output. loaded: the outputs of the artifact,
    loaded by another process, are bit-identical. folded: how many batch norms went into the layers before them; fused:
    the largest difference in eval mode after that, and fused_exact: in float64, where float32 leaves doubt. stepped: a
    step on the converted model by the sign of the gradient moves every parameter that has one. exact: the larger
    difference in float64, where float32 leaves doubt. failure: what went wrong, and where. onnx: the largest difference
    of the ONNX file in ONNX Runtime; no_onnx: why there is no such file.
    """

    source: str
    kind: str
    parameters: int = 0
    input: tuple[int, ...] = ()
    convolutions: int = 0
    converted: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    eval: float | None = None
    train: float | None = None
    exact: float | None = None
    loaded: bool | None = None
    folded: int = 0
    fused: float | None = None
    fused_exact: float | None = None
    stepped: bool | None = None
    seconds: float = 0.0
    failure: str = ""
    onnx: float | None = None
    no_onnx: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_model(case: Case, folder: Path) -> Row:
    """All but ``loads_alike``, whose files it leaves in ``folder``; whatever is raised ends in ``failure``."""
    begin = time.perf_counter()
    found: dict[str, Any] = {"source": case.source, "kind": case.kind}
    try:
        _try(case, folder, found)
    except Exception as error:  # a sweep goes on
        place = traceback.extract_tb(error.__traceback__)[-1]
        found["failure"] = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return Row(**found, seconds=round(time.perf_counter() - begin, 1))


def loads_alike(folder: Path) -> bool:
    """Whether the artifact that ``try_model`` left in ``folder`` loads by itself and gives the same outputs."""
    kept = torch.load(folder / OUTPUTS, weights_only=True)
    ours, theirs = kept["outputs"], _outputs(cs.load(folder / ARTIFACT), kept["arguments"])
    same = [a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(ours, theirs)]  # noqa: B905
    return bool(same) and len(ours) == len(theirs) and all(same)


def try_onnx(row: Row, case: Case, folder: Path) -> Row:
    """``row`` with what came of an ONNX file of the converted model."""
    try:
        torch.manual_seed(0)
        model = case.build()
        conversion = _converted(model, _settled(case, model))
        exported = cs.export(conversion.model, folder / "model.onnx")
    except Exception as error:
        return replace(row, onnx=None, no_onnx=str(error).splitlines()[0])
    return replace(row, onnx=exported.difference, no_onnx="")


def _converted(model: nn.Module, arguments: tuple[Any, ...]) -> cs.Conversion:
    variant = cs.CondConv(experts=EXPERTS)
    return cs.convert(model, variant, example=arguments, skip_stem=False, skip_pooled=False, inplace=True)


def _try(case: Case, folder: Path, found: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = case.build()
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["convolutions"] = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    if not found["convolutions"]:
        kinds = Counter(type(m).__name__ for m in model.modules() if "Conv" in type(m).__name__)
        found["notes"] = (f"no 2D convolution ({', '.join(kinds) or 'none of any kind'})",)
        return
    arguments = _settled(case, model)
    found["input"] = _first_shape(arguments)
    conversion = _converted(model, arguments)
    _describe(conversion, found)
    cs.save(conversion.model, folder / ARTIFACT)
    torch.save({"arguments": arguments, "outputs": _outputs(conversion.model, arguments)}, folder / OUTPUTS)
    found["folded"], found["fused"] = _folded(conversion.model, arguments)
    if found["fused"] and found["fused"] > DOUBTFUL and fits_in_float64(conversion.model):
        with contextlib.suppress(Exception):  # not every model runs in float64
            found["fused_exact"] = _folded(copy.deepcopy(conversion.model).double(), _in_float64(arguments))[1]
    found["stepped"] = _takes_a_step(conversion.model, arguments)


def _fitting(case: Case, model: nn.Module) -> tuple[Any, ...]:
    """The first arguments on which the model runs in both modes, else in eval mode."""
    runs: dict[bool, tuple[Any, ...]] = {}
    for arguments in inputs_of(case, model):
        for training in (False, True):
            try:
                _outputs(model, arguments, training)
            except Exception:  # too small, or not its size
                break
            runs.setdefault(training, arguments)
        if True in runs:
            return runs[True]
    return runs[False] if runs else arguments


def _settled(case: Case, model: nn.Module) -> tuple[Any, ...]:
    """Arguments that ``model`` runs on, whose statistics its batch norms have taken, as in a trained model: with those
    that they are made with, a deep network of random weights computes nearly the same for every input."""
    arguments = _fitting(case, model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average of all batches
        norm.reset_running_stats()
    with contextlib.suppress(Exception):  # no train mode on this input
        _outputs(model, arguments, training=True)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return arguments


def _describe(conversion: cs.Conversion, found: dict[str, Any]) -> None:
    plan, difference = conversion.plan, conversion.difference
    assert difference is not None
    found["converted"] = len(plan.to_convert)
    found["skipped"] = dict(Counter(skip.reason for skip in plan.skipped))
    found["notes"] = plan.notes
    found["eval"] = difference.eval and difference.eval.relative
    found["train"] = difference.train and difference.train.relative
    if conversion.difference_float64 is not None:
        found["exact"] = max(
            gap.relative
            for gap in (conversion.difference_float64.eval, conversion.difference_float64.train)
            if gap is not None
        )


def _folded(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[int, float | None]:
    folding = cs.fold(model, example=arguments, tolerance=math.inf)
    return len(folding.folded), folding.difference and folding.difference.relative


def _takes_a_step(model: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """In train mode where the model has one, with any differentiable number as the loss."""
    for _ in range(2):  # a head that starts at zero passes no gradient on before it has moved itself
        model.zero_grad()
        try:
            loss = _loss(model.train()(*arguments))
        except Exception:  # what has no train mode on this input (a batch norm over one value) steps in eval mode
            loss = _loss(model.eval()(*arguments))
        loss.backward()
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], error_if_nonfinite=True)
        moved = [_moves(parameter) for parameter in model.parameters() if parameter.grad is not None]
        learning = [layer.weight for layer in conditional_layers(model).values() if layer.weight.grad is not None]
    return bool(learning) and all(moved) and any(weight.grad.any() for weight in learning)


@torch.no_grad()
def _moves(parameter: nn.Parameter) -> bool:
    """Step by the sign of the gradient, however small: Adam's first step, without the memory of Adam's state."""
    assert parameter.grad is not None
    before = parameter.clone()
    parameter.sub_(parameter.grad.sign_(), alpha=1e-3)
    return not torch.equal(parameter, before) or not bool(parameter.grad.any())


def _loss(output: Any) -> Tensor:
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([(t.float() - 1.0).square().mean() for t in leaves]).sum()


def _outputs(model: nn.Module, arguments: tuple[Any, ...], training: bool = False) -> list[Tensor]:
    with in_mode(model, training), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [leaf for leaf in pytree.tree_leaves(model(*arguments)) if isinstance(leaf, Tensor)]


def _in_float64(arguments: tuple[Any, ...]) -> Any:
    return pytree.tree_map(lambda leaf: _double(leaf), arguments)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _first_shape(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    first = arguments[0]
    return (len(first), *first[0].shape) if isinstance(first, list) else tuple(first.shape)
