"""Read a pickle without running code from it: tensors, and whole modules when every name in the file is allowed.

The file is first disassembled, not run, to list its names. Every name is looked up in ``allowlist``, and torch's own
restricted unpickler (``weights_only=True``) then reads the file with exactly those names.
"""

from __future__ import annotations

import pickle
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from condconv_surgery.errors import DamagedFileError, InputError, SurgeryError, listed
from condconv_surgery.models.checkpoints.allowlist import DATA_NAMES, resolve, trusted

_FORBIDDEN = ("GLOBAL", "Can only", "Trying to call")
"""Parts of the messages of torch's restricted unpickler for a forbidden name; its other errors mean a damaged file."""

_ONE_AT_A_TIME = threading.Lock()
"""torch keeps the names of ``safe_globals`` for the whole process: of two reads, the first to end would drop both's."""

OF_QUANTISATION = ("torch.ao.", "torch.quantization.", "torch.nn.quantized.", "torch.nn.qat.", "torch.nn.intrinsic.")
"""Packages of torch whose modules quantise."""

MAX_PROTOCOL = 3
"""The newest pickle protocol of torch's restricted unpickler: 4 has frames and other opcodes that name a class."""

MAX_DEPTH = 200
"""Limit of nested modules."""


def load_pickle(path: Path, trust: str | tuple[str, ...] = ()) -> Any:
    """The object that ``torch.save`` wrote to ``path``, on the CPU.

    trust: packages whose classes and functions the file may name, beyond those of ``allowlist``.

    Raises ``InputError`` for a name that is not allowed, saying which package to trust, and ``DamagedFileError`` for a
    file that cannot be read.
    """
    packages = trusted(trust)
    names = _names(path)
    allowed = _allowed(names, packages, path)
    try:
        with _ONE_AT_A_TIME, safe_globals(allowed), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.filterwarnings("ignore", "Validating sparse tensor|TypedStorage is deprecated", UserWarning)
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # 3 is read like 2
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file's own arguments reach constructors: anything may go wrong there
        if isinstance(error, pickle.UnpicklingError) and any(part in str(error) for part in _FORBIDDEN):
            raise _refused(path, names) from error
        if (protocol := _protocol(path)) > MAX_PROTOCOL:
            raise InputError(
                f"{path} was written with pickle protocol {protocol}.",
                f"torch reads protocols up to {MAX_PROTOCOL} without running code in a file; its default is 2.",
                "torch.save(model.state_dict(), 'model.pt') where the model was made, without pickle_protocol",
            ) from error
        raise DamagedFileError(
            f"{path} is a torch file that cannot be read: {_reason(error)}",
            "It must be whole, written by torch.save, with versions of its packages like those installed here.",
            "copy or download it again, or save model.state_dict() where the model was made",
        ) from error


def check_module(model: nn.Module, path: Path) -> nn.Module:
    """``model``, after a check that its modules, parameters and buffers are such.

    Raises ``DamagedFileError`` when one is another object, or a module contains itself.
    """
    try:
        _check_tree(model, ())
    except (AttributeError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"{path} holds a module that is not whole: {error}.",
            "Each module, parameter and buffer must be one.",
            "save model.state_dict() where the model was made",
        ) from error
    return model


def _protocol(path: Path) -> int:
    """The pickle protocol in the header of the file; 0 where it has none."""
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                record = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                head = archive.open(record).read(2)
        except Exception:  # not whole: the error of torch.load says so
            return 0
    return head[1] if len(head) == 2 and head[:1] == pickle.PROTO else 0


def _reason(error: Exception) -> str:
    """The first line of torch's error, without its advice to use ``weights_only=False``."""
    lines = [line for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _names(path: Path) -> list[str]:
    """The names in the file beyond those of tensors; none for a file from before torch 1.6, which lists no names."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip of torch's own, or cut short: the error of torch.load says so
        return []


def _allowed(names: list[str], trust: tuple[str, ...], path: Path) -> list[tuple[Any, str]]:
    _require_unquantised(names, path)
    of_arrays = [name for name in DATA_NAMES["numpy"] if name.startswith("numpy.dtypes.")] if "numpy" in trust else []
    try:
        return [(resolve(name, trust), name) for name in (*names, *of_arrays)]  # a pickle names dtypes by their letters
    except InputError as error:
        content = f"{path} is a pickle of more than tensors (a module, or a training state with its options)."
        raise InputError(f"{content} {error.given}", error.allowed, error.fix) from error


def _require_unquantised(names: list[str], path: Path) -> None:
    """Raise ``InputError`` for modules that torch.ao puts in the place of layers, which hold int8 or observe floats."""
    own = [name for name in names if name.startswith(OF_QUANTISATION)]
    if not own:
        return
    if quantised := [name for name in own if ".quantized." in name]:
        raise InputError(
            f"{path} is a pickle of a quantised network: it names {listed(quantised)}.",
            "Conversion needs the trained weights in floating point; quantise after training, by condconv export.",
            "torch.save(model.state_dict(), 'model.pt') with the model before it was quantised",
        )
    raise InputError(
        f"{path} is a pickle of a network prepared for quantisation: it names {listed(own)}.",
        "Its weights are in floating point still: of a state dict they are read, and the observers left out.",
        "torch.save(model.state_dict(), 'model.pt') where the model was made, then model.pt with "
        'arch="package.module:factory", a function that builds the network without them',
    )


def _check_tree(module: nn.Module, above: tuple[int, ...]) -> None:
    if id(module) in above:
        raise ValueError("it contains itself")
    if len(above) > MAX_DEPTH:
        raise ValueError(f"modules in modules, more than {MAX_DEPTH} deep")
    for slots, kind in ((module._parameters, nn.Parameter), (module._buffers, Tensor), (module._modules, nn.Module)):
        for name, value in slots.items():
            if not isinstance(name, str) or not (value is None or isinstance(value, kind)):
                raise TypeError(f"{name!r} is a {type(value).__name__}, not a {kind.__name__}")
    for child in module._modules.values():
        if child is not None:
            _check_tree(child, (*above, id(module)))


def _refused(path: Path, names: list[str]) -> SurgeryError:
    shown = f" (it names {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
    return InputError(
        f"{path} is a pickle that would have to run code to be read{shown}, so it is not.",
        "Only tensors, and modules made of known layers, are read from a pickle.",
        "torch.save(model.state_dict(), 'model.pt') where you trust the file",
    )
