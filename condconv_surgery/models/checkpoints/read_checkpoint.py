"""The weights, or the whole module, in a checkpoint of another program.

Training scripts nest the weights in dicts; prefixes before their names are for ``state_names``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.checkpoints.file_type import REFUSALS, SAFETENSORS, file_kind
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

_LOG = logging.getLogger("condconv_surgery")

MAX_DEPTH = 4
"""Limit of nested dicts; a pickled dict may contain itself."""


def read_checkpoint(path: Path, trust: tuple[str, ...] = ()) -> dict[str, Tensor] | nn.Module:
    """The state dict in a ``.pt``, ``.pth`` or ``.safetensors`` file, with its own names; or the module in it.

    trust: packages whose classes a pickled module may name, beyond torch.nn, torchvision and timm.

    Raises ``InputError`` for a file of another kind and ``DamagedFileError`` for a broken one.
    """
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
        raise InputError(
            f"{path} holds no weights: {_described(content)}.",
            f"They must be the whole file, or under one of: {', '.join(NESTS)}.",
            "torch.save(model.state_dict(), 'model.pt')",
        )
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


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"keys {', '.join(map(str, list(content)[:6]))}" if content else "an empty dict"
