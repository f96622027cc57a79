"""The weights, or the whole module, in a checkpoint of another program.

Training scripts nest the weights in dicts and put prefixes before their names; both are removed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.checkpoints.file_type import REFUSALS, SAFETENSORS, file_kind
from condconv_surgery.models.checkpoints.pickled_modules import check_module, load_pickle

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model_state", "model", "net", "weights")
"""Keys under which training scripts store the weights, averaged ones first."""

MAX_DEPTH = 4
"""Limit of nested dicts; a pickled dict may contain itself."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and wrapper modules put before every name."""


def read_checkpoint(path: Path, trust: tuple[str, ...] = ()) -> dict[str, Tensor] | nn.Module:
    """The state dict in a ``.pt``, ``.pth`` or ``.safetensors`` file, without wrappers' prefixes; or the module in it.

    trust: packages whose classes a pickled module may name, beyond torch.nn, torchvision and timm.

    Raises ``InputError`` for a file of another kind and ``DamagedFileError`` for a broken one.
    """
    kind = file_kind(path)
    if kind in REFUSALS:
        allowed, fix = REFUSALS[kind]
        raise InputError(f"{path} is {kind}.", allowed, fix.format(path=path))
    content = _load_safetensors(path) if kind == SAFETENSORS else load_pickle(path, trust)
    found = _find_weights(content, path)
    return check_module(_unwrapped(found), path) if isinstance(found, nn.Module) else _without_prefixes(found)


def read_tensors(path: Path, trust: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict of ``read_checkpoint``; of a whole module, its own."""
    found = read_checkpoint(path, trust)
    return dict(found.state_dict()) if isinstance(found, nn.Module) else found


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as safetensors: {error}.", "It must be whole.", "copy or download it again"
        ) from error


def _find_weights(content: Any, path: Path, depth: int = 0) -> dict[str, Tensor] | nn.Module:
    if isinstance(content, nn.Module):
        return content
    if isinstance(content, dict):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
        for nest in NESTS:
            if isinstance(content.get(nest), (dict, nn.Module)) and depth < MAX_DEPTH:
                return _find_weights(content[nest], path, depth + 1)
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if len(tensors) > len(content) / 2:
            return tensors
    raise InputError(
        f"{path} holds no weights: {_described(content)}.",
        f"They must be the whole file, or under one of: {', '.join(NESTS)}.",
        "torch.save(model.state_dict(), 'model.pt')",
    )


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"keys {', '.join(map(str, list(content)[:6]))}" if content else "an empty dict"


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel and its like."""
    inner = getattr(model, "module", None)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) and isinstance(inner, nn.Module):
        return inner
    return model
