"""The weights, or the whole module, in a checkpoint of another program.

Training scripts nest the weights in dicts; prefixes before their names are for ``state_names``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.checkpoints.file_type import INDEX, SAFETENSORS, file_kind, instead_of, refusal
from condconv_surgery.models.checkpoints.foreign_files import REFUSALS
from condconv_surgery.models.checkpoints.lit_ema import with_averages
from condconv_surgery.models.checkpoints.pickled_modules import check_module, load_pickle
from condconv_surgery.models.checkpoints.tensor_kinds import dense
from condconv_surgery.models.checkpoints.weight_sets import find_weights

SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}$")
"""The end of the name, without suffix, of one of several files of a checkpoint."""


def read_checkpoint(path: Path, trust: tuple[str, ...] = ()) -> dict[str, Tensor] | nn.Module:
    """The state dict in a ``.pt``, ``.pth`` or ``.safetensors`` file, with its own names; or the module in it.

    trust: packages whose classes a pickled module may name, beyond torch.nn, torchvision and timm.

    A checkpoint in several files is read by its index (``model.safetensors.index.json``).

    Raises ``InputError`` for a file of another kind and ``DamagedFileError`` for a broken one.
    """
    return read_named_checkpoint(path, trust)[0]


def read_named_checkpoint(path: Path, trust: tuple[str, ...] = ()) -> tuple[dict[str, Tensor] | nn.Module, str]:
    """``read_checkpoint``, and the name of the architecture that the file states under ``arch``, as timm's ``train.py``
    and torch's ImageNet example write it; empty where there is none."""
    if path.name.endswith(INDEX):
        return _read_shards(path, trust), ""
    if SHARD.search(path.stem):
        index = next(iter(sorted(path.parent.glob(f"*{INDEX}"))), None)
        raise InputError(
            f"{path} is one of several files of a checkpoint.",
            "Its index names them all.",
            f"{index}" if index else f"the folder of the whole checkpoint, with its *{INDEX}",
        )
    return _read_file(path, trust)


def _read_shards(index: Path, trust: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of all files that the index names. They lie beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = [index.parent / Path(name).name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{index} cannot be read as the index of a checkpoint ({type(error).__name__}: {error}).",
            "It is JSON whose weight_map names the file of each tensor.",
            "copy or download it again",
        ) from error
    weights: dict[str, Tensor] = {}
    for path in paths:
        part, _ = _read_file(path, trust)
        weights |= part.state_dict() if isinstance(part, nn.Module) else part
    return weights


def _read_file(path: Path, trust: tuple[str, ...]) -> tuple[dict[str, Tensor] | nn.Module, str]:
    kind = file_kind(path)
    if kind in REFUSALS:
        raise refusal(path, kind)
    content = _load_safetensors(path) if kind == SAFETENSORS else load_pickle(path, trust)
    weights = find_weights(content, path)
    stated = content.get("arch") if isinstance(content, dict) else None
    arch = stated if isinstance(stated, str) else ""
    if not isinstance(weights, nn.Module):
        return with_averages(dense(weights, f"{path}"), path), arch
    wrapped = isinstance(weights, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = getattr(weights, "module", None) if wrapped else None
    return check_module(inner if isinstance(inner, nn.Module) else weights, path), arch


def read_weights(path: Path, trust: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict of ``read_checkpoint``; of a whole module, its own."""
    content = read_checkpoint(path, trust)
    return dict(content.state_dict()) if isinstance(content, nn.Module) else content


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as safetensors: {error}.",
            "It must be whole.",
            instead_of(path, "copy or download it again"),
        ) from error
