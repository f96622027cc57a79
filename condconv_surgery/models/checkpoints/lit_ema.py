"""Averaged weights as LitEma of latent diffusion keeps them: a buffer for each parameter, its name without the dots.

model.diffusion_model.out.2.weight              the parameter, of the module that is averaged
model_ema.diffusion_modelout2weight             its average
model_ema.decay, model_ema.num_updates          two numbers
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

NUMBERS = ("decay", "num_updates")

_LOG = logging.getLogger("condconv_surgery")


def with_averages(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``state`` with the averages of LitEma in the place of the parameters; as it is where it holds none.

    A log line says what was taken. Buffers have no average and stay.
    """
    for name in [name for name in state if name.rpartition(".")[2] == NUMBERS[1]]:
        prefix = name.removesuffix(NUMBERS[1])
        averages = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        if any("." in key for key in averages) or not averages.keys() >= set(NUMBERS):
            continue
        averages = {key: tensor for key, tensor in averages.items() if key not in NUMBERS}
        rest = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
        module, names = _averaged_module(rest, averages)
        if not names:
            _LOG.warning("%s: the averages under %r fit no weights beside them and were not taken", path, prefix)
            return rest
        _LOG.warning(
            "%s: took %d averaged weights under %r (LitEma) in the place of those under %r",
            *(path, len(names), prefix, module),
        )
        return rest | {key: averages[short] for key, short in names.items()}
    return state


def _averaged_module(rest: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """The prefix of the module whose parameters are averaged, and the average of each of them by its name."""
    parts = [name.split(".") for name in rest]
    prefixes = dict.fromkeys(".".join([*part[:depth], ""]) if depth else "" for part in parts for depth in range(3))
    for prefix in prefixes:
        inside = [name for name in rest if name.startswith(prefix)]
        short = {name: name.removeprefix(prefix).replace(".", "") for name in inside}
        names = {name: key for name, key in short.items() if key in averages}
        unique = len(set(names.values())) == len(names) == len(averages)  # two names may lose their difference
        if unique and all(rest[name].shape == averages[key].shape for name, key in names.items()):
            return prefix, names
    return "", {}
