"""Copy a foreign state dict into a model: names and shapes must be equal; the error shows the first that differs."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import Source

OPTIONAL = ("num_batches_tracked", "router.temperature")
"""Ends of the names that files of older versions, or of other implementations, lack."""

_LOG = logging.getLogger("condconv_surgery")

_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


def modern_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as today's torchvision has them: DenseNet's published files have dots inside module names (``norm.1``)."""
    return {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}


@torch.no_grad()
def fill_foreign(model: nn.Module, state: dict[str, Tensor], what: str, source: Source) -> None:
    """Copy ``state`` into ``model``, strictly except for ``OPTIONAL`` names; the model takes its dtype.

    Of several dtypes of floating point, in which layers do not compute together, it takes the one that holds all.

    what: the file, for messages. Raises ``InputError`` when names or shapes differ.
    """
    targets = model.state_dict(keep_vars=True)
    missing = [name for name in targets if name not in state and not name.endswith(OPTIONAL)]
    unexpected = [name for name in state if name not in targets]
    wrong = [name for name in state if name in targets and state[name].shape != targets[name].shape]
    if missing or unexpected or wrong:
        raise _misfit(what, source, missing, unexpected, [(n, state[n], targets[n]) for n in wrong])
    common = _common_dtype([state[name] for name in state if targets[name].is_floating_point()], what)
    for name, tensor in state.items():
        target = targets[name]
        if tensor.is_floating_point() and target.dtype != (dtype := common or tensor.dtype):
            target.data = target.data.to(dtype)
        target.copy_(tensor)


def _common_dtype(tensors: Iterable[Tensor], what: str) -> torch.dtype | None:
    """The dtype that holds all values, where there are several of floating point; else ``None``."""
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(kinds) < 2:
        return None
    common = functools.reduce(torch.promote_types, kinds)
    names = sorted(str(kind).removeprefix("torch.") for kind in kinds)
    _LOG.warning(
        "%s: weights in %s: all are taken in %s", what, " and ".join(names), str(common).removeprefix("torch.")
    )
    return common


def _misfit(
    what: str, source: Source, missing: list[str], unexpected: list[str], wrong: list[tuple[str, Tensor, Tensor]]
) -> InputError:
    fix = 'arch="package.module:factory", a function that builds the network of the file'
    if wrong:
        name, tensor, target = wrong[0]
        detail = f"{name!r} has shape {tuple(tensor.shape)}, the model {tuple(target.shape)}"
        only_classes = tensor.shape[1:] == target.shape[1:] and not missing and len(wrong) <= 4
        fix = f"num_classes={tensor.shape[0]}" if only_classes else fix
    elif missing:
        close = difflib.get_close_matches(missing[0], unexpected, 1)
        detail = f"it lacks {missing[0]!r}" + (f" (it has {close[0]!r})" if close else "")
    else:
        detail = f"it has {unexpected[0]!r}, which the model lacks"
    return InputError(
        f"The weights in {what} do not fit {source.name}: {detail}.",
        f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape; all must fit.",
        fix,
    )
