"""The model and the images of a command that runs a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from condconv_surgery.errors import InputError, unknown_name

from .output.console import say

if TYPE_CHECKING:
    from torch import nn

    from condconv_surgery.deploy.round_experts import Rounded

PRECISIONS: tuple[Rounded, ...] = ("int8", "bfloat16")


def load_to_run(
    spec: str,
    arch: str | None,
    weights: str,
    input_size: int | None,
    trust: tuple[str, ...],
    device: str,
    dtype: str | None,
    precision: Rounded | None = None,
) -> nn.Module:
    """The model of a command that runs it, on its device, its experts rounded if asked for. Raises ``InputError``."""
    import torch

    from condconv_surgery.models.sources import load_model

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}, but torch sees no GPU.", "cpu always works.", "--device cpu")
    say(f"Loading {spec}")
    model = load_model(spec, arch=arch, weights=weights, input_size=input_size, trust=trust)
    try:
        model = model.to(device=device, dtype=getattr(torch, dtype) if dtype else None)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: {reason}", "A device that torch knows.", "--device cpu") from error
    return model if precision is None else _rounded(model, spec, precision)


def require_precision(precision: str | None) -> Rounded | None:
    """``precision``, or ``InputError`` for one that ``round_experts`` does not know."""
    if precision is None:
        return None
    for known in PRECISIONS:
        if precision == known:
            return known
    raise unknown_name("precision of experts", precision, PRECISIONS, "--round-experts int8")


def _rounded(model: nn.Module, spec: str, precision: Rounded) -> nn.Module:
    """With its experts in ``precision``; a model that has none, as a static baseline, as it is."""
    from condconv_surgery.deploy import round_experts
    from condconv_surgery.layers import conditional_layers

    if not conditional_layers(model):
        say(f"{spec} has no experts to round")
        return model
    rounding = round_experts(model, precision, inplace=True)
    sizes = f"{rounding.bytes_before / 1e6:.1f} -> {rounding.bytes_after / 1e6:.1f} MB"
    say(f"Experts of {spec} in {precision}: {sizes}, weights off by at most {rounding.error:.1g}")
    return rounding.model


def own_split(data: str, model: str) -> str:
    """``data``; of the word ``run`` the folder of the model's file, whose run chose the validation images."""
    run = run_of(model)
    return str(run) if data == "run" and not Path("run").exists() and run.is_dir() else data


def run_of(model: str) -> Path:
    """The folder of a model's file, which may be that of its run; a directory, or the name of a model, as it is."""
    path = Path(model)
    return path.parent if path.is_file() else path
