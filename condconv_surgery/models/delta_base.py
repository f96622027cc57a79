"""``save`` and ``load`` with the base model of a delta file: named, or given as a file or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact import save_load
from condconv_surgery.models.artifact.delta import Base, DeltaRecord
from condconv_surgery.models.artifact.rounded_experts import RoundedExperts
from condconv_surgery.models.checkpoints.allowlist import trusted
from condconv_surgery.models.hub_source import artifact_file
from condconv_surgery.models.sources import base_of_name, load_model
from condconv_surgery.models.torchvision_source import published_weights

Precision = Literal["exact", "bfloat16", "int8"]
PRECISIONS = get_args(Precision)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    alone: bool = True,
    base: str | Path | nn.Module | None = None,
    precision: Precision = "exact",
    trust: str | tuple[str, ...] = (),
) -> DeltaRecord | RoundedExperts | None:
    """Write ``model``, converted or not, so that ``load(path)`` gives it back with bit-identical outputs.

    The recipe is the model's own, updated from its modules. A model that differs from what its source builds, or has no
    source, is described module by module, with the values of its plain attributes. ``torch.compile``, ``DataParallel``,
    ``DistributedDataParallel`` and ``AveragedModel`` are taken off. Training flags, ``requires_grad`` (as in a state
    dict: freeze again after ``load``) and hooks are not saved.

    alone: the file must be enough. Without it, a model that cannot be described (hooks, local functions) is written
        too, for ``load(path, model=skeleton)``.
    base: the model that was converted, as ``load_model`` takes it or itself. The file then holds what the base has not:
        a delta file, for which ``load`` needs the same base, compared by its SHA-256.
    precision: of the experts: ``"bfloat16"`` halves them, ``"int8"``, with a scale for each filter, takes a quarter;
        they are floats again when loaded. With ``base``, of the differences from its weights, ``"bfloat16"`` only.
        Routers, biases, norms and plain layers stay exact. The ``error`` of the record that is returned is the largest
        difference of a weight.
    trust: packages, as ``load`` takes them, whose code may build ``base``.

    Raises ``InputError`` when the file cannot be written, would not be enough, a tensor has no values, the base has
    none of them or no experts would get smaller; an existing file is then unchanged.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"precision is {precision!r}.", f"It must be one of: {', '.join(PRECISIONS)}.", 'precision="int8"'
        )
    if base is not None and precision == "int8":
        raise InputError(
            'precision="int8" with base=.',
            "Differences from a base are rounded to bfloat16; int8 is for the experts of a whole file.",
            'precision="bfloat16", or leave base= out',
        )
    return save_load.save(model, path, alone=alone, base=_base(base, trusted(trust)), precision=precision)


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    trust: str | tuple[str, ...] = (),
    base: str | Path | nn.Module | None = None,
) -> nn.Module:
    """The model that ``save`` wrote, in eval mode, on the CPU, carrying its recipe.

    path: a file, a folder of ``save_pretrained``, or ``hf:OWNER/NAME``.
    model: the unconverted model, for a file that cannot rebuild it or names classes of a script or notebook; it is
        converted in place and returned.
    trust: packages, ``trust=["mypackage"]``, whose factories and classes the file may name, beyond torch.nn,
        torchvision and timm.
    base: of a delta file, where the name in it does not find the base: another name, a file of weights, or the model.

    Raises ``InputError`` for a file of another kind, a package that is not trusted or another base, and
    ``DamagedFileError`` for a file that is truncated, altered or newer.
    """
    given = _base(base, trusted(trust))
    path = artifact_file(path)
    return save_load.load(path, model=model, trust=trust, base=base_of_name if given is None else lambda name: given)


def _base(base: str | Path | nn.Module | None, trust: tuple[str, ...] = ()) -> Base | None:
    """A file of weights as torchvision published it has the name under which torchvision finds it."""
    if base is None:
        return None
    if isinstance(base, nn.Module):
        return Base(type(base).__name__, {name: tensor.cpu() for name, tensor in base.state_dict().items()})
    path = Path(base)
    published = published_weights(path) if path.is_file() else None
    name = path.name if path.is_file() else f"{base}"
    tensors = dict(load_model(base, trust=trust).state_dict())
    return Base(f"torchvision:{published[0]}" if published else name, tensors)
