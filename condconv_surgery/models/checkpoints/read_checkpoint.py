"""The weights, or the whole module, in a checkpoint of another program.

Training scripts nest the weights in dicts; prefixes before their names are for ``state_names``.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.checkpoints.file_type import INDEX, REFUSALS, SAFETENSORS, file_kind
from condconv_surgery.models.checkpoints.pickled_modules import check_module, load_pickle

AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "teacher")
"""Keys under which training scripts store averaged weights (DINO's teacher averages the student's)."""

NESTS = (
    *AVERAGED,
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "weights",
    "params",
    "module",
    "student",
)
"""Keys under which training scripts store weights; the first that holds some is taken."""

SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}$")
"""The end of the name, without suffix, of one of several files of a checkpoint."""

_LOG = logging.getLogger("condconv_surgery")

MAX_DEPTH = 4
"""Limit of nested dicts; a pickled dict may contain itself."""


def read_checkpoint(path: Path, trust: tuple[str, ...] = ()) -> dict[str, Tensor] | nn.Module:
    """The state dict in a ``.pt``, ``.pth`` or ``.safetensors`` file, with its own names; or the module in it.

    trust: packages whose classes a pickled module may name, beyond torch.nn, torchvision and timm.

    A checkpoint in several files is read by its index (``model.safetensors.index.json``).

    Raises ``InputError`` for a file of another kind and ``DamagedFileError`` for a broken one.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path, trust)
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
        part = _read_file(path, trust)
        weights |= part.state_dict() if isinstance(part, nn.Module) else part
    return weights


def _read_file(path: Path, trust: tuple[str, ...]) -> dict[str, Tensor] | nn.Module:
    kind = file_kind(path)
    if kind in REFUSALS:
        allowed, fix = REFUSALS[kind]
        raise InputError(f"{path} is {kind}.", allowed, fix.format(path=path))
    content = _load_safetensors(path) if kind == SAFETENSORS else load_pickle(path, trust)
    weights = _find_weights(content, path)
    if not isinstance(weights, nn.Module):
        return weights
    wrapped = isinstance(weights, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = getattr(weights, "module", None) if wrapped else None
    return check_module(inner if isinstance(inner, nn.Module) else weights, path)


def read_weights(path: Path, trust: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict of ``read_checkpoint``; of a whole module, its own."""
    content = read_checkpoint(path, trust)
    return dict(content.state_dict()) if isinstance(content, nn.Module) else content


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as safetensors: {error}.", "It must be whole.", "copy or download it again"
        ) from error


def _find_weights(content: Any, path: Path) -> dict[str, Tensor] | nn.Module:
    """The weights in what a file holds; a log line names the set taken, and the others where there are several."""
    weights, key = _weights_in(content)
    if weights is None:
        weights, key = _weights_under_another_key(content, path)
    others = [nest for nest in NESTS if key not in ("", nest) and _weights_in(content.get(nest))[0] is not None]
    if key:
        averaged = " (averaged)" if key in AVERAGED else ""
        instead = f", not those under {', '.join(others)}" if others else ""
        _LOG.warning("%s: took the weights under %r%s%s", path, key, averaged, instead)
    return weights


def _weights_in(content: Any, depth: int = 0) -> tuple[dict[str, Tensor] | nn.Module | None, str]:
    """The weights in ``content``, or ``None``; and the key of ``NESTS`` that holds them, ``""`` for itself."""
    if isinstance(content, nn.Module):
        return content, ""
    if not isinstance(content, dict) or depth > MAX_DEPTH:
        return None, ""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(content):
        for nest in NESTS:
            weights, _ = _weights_in(content.get(nest), depth + 1)
            if weights is not None:
                return weights, nest
    return (tensors, "") if len(tensors) > len(content) / 2 else (None, "")


def _weights_under_another_key(content: Any, path: Path) -> tuple[dict[str, Tensor] | nn.Module, str]:
    """The only weights directly in a dict, and their key. Raises ``InputError`` where there are none or several."""
    items = content.items() if isinstance(content, dict) else ()
    found = {str(key): weights for key, value in items if (weights := _weights_in(value)[0]) is not None}
    if len(found) == 1:
        key, weights = found.popitem()
        return weights, key
    fix = f"torch.load('{path}', weights_only=True)[{next(iter(found))!r}]" if found else "model.state_dict()"
    raise InputError(
        f"{path} holds {'several sets of weights' if found else 'no weights'}: {_described(content)}.",
        f"They must be the whole file, the only ones, or under one of: {', '.join(NESTS)}.",
        f"torch.save({fix}, 'model.pt')",
    )


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"keys {', '.join(map(str, list(content)[:6]))}" if content else "an empty dict"
