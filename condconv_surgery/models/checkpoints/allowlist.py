"""The names that a file may contain: classes that only build layers; nothing that reads, writes, fetches or runs.

A pickle and a skeleton name classes by text. Such a name is looked up here before anything is imported. A file may call
what it names with arguments of its own choosing, so a name is allowed only if every call of it is harmless:

- layer classes (``nn.Module``), enumerations and plain helper classes of the modules of torch.nn, torchvision and timm
  that define layers. Not all of those packages: ``torchvision.datasets`` and a class in ``timm.task`` download.
- functions of modules with nothing but arithmetic on tensors.
- ``functools.partial`` and the containers of ``collections`` (not ``namedtuple``, which compiles text).
- classes and functions that a package trusted by the user defines itself.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from condconv_surgery.errors import InputError

LAYER_MODULES = (
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "timm.layers",
    "timm.models",
    "condconv_surgery.layers.conv2d_subclasses",
    "condconv_surgery.models.mobilenet_v1",
)
"""Modules and packages that define layer classes."""

HELPER_MODULES = ("torch.nn.utils", "torchvision.models", "torchvision.ops", "timm.layers", "timm.models")
"""Modules and packages that define the plain classes in layers (box coders, matchers, weight normalisation)."""

ARITHMETIC_MODULES = (
    "torch.nn.functional",
    "torchvision.ops.boxes",
    "torchvision.models.optical_flow.raft",
    "timm.layers.activations",
)
"""Modules all of whose own functions compute on tensors and do nothing else."""

TORCH_FUNCTIONS = tuple(
    f"torch.{name}{suffix}"
    for name, suffixes in (
        (
            "abs acos add addmm asin atan bmm cat celu clamp cos cosh cumsum div einsum erf exp exp2 expm1 flatten",
            ("",),
        ),
        ("floor log log10 log1p log2 log_softmax logsumexp matmul max maximum mean min minimum mish mm mul neg", ("",)),
        ("permute pow prod round rsqrt sign sin sinh softmax sqrt square stack std sub sum tan transpose var", ("",)),
        ("relu sigmoid tanh selu silu rrelu prelu", ("", "_")),
    )
    for name in name.split()
    for suffix in suffixes
    if hasattr(torch, f"{name}{suffix}")
)
"""Functions of ``torch`` itself that models hold as activations. (Others read files: ``torch.from_file``.)"""

PLAIN_NAMES = (
    "torch.nn.modules.module._WrappedHook",  # which holds a hook for loading a state, as spectral_norm has one
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.deque",
    "collections.Counter",
    "functools.partial",
)

DATA_NAMES: dict[str, tuple[str, ...]] = {
    "argparse": ("argparse.Namespace",),
    "datetime": ("datetime.datetime", "datetime.date", "datetime.timedelta"),
    "numpy": tuple(
        f"numpy.{name}"
        for name in (
            "dtype",
            "ndarray",
            "core.multiarray.scalar",
            "core.multiarray._reconstruct",
            "_core.multiarray.scalar",
            "_core.multiarray._reconstruct",
            *(f"dtypes.{kind}DType" for kind in ("Bool", "UInt8", "Int32", "Int64", "Float16", "Float32", "Float64")),
        )
    ),
    "pathlib": ("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath"),
    "types": ("types.SimpleNamespace",),
}
"""Packages with commands beside data classes: trusting one allows only these names."""


OWN_CLASSES_OF = {"condconv_surgery.integrations.ultralytics.yolo_networks": "ultralytics"}
"""Modules of ours that extend the classes of a package, allowed with that package."""

_PUBLISHED = {
    name.replace("-", "_"): name
    for name in (
        "efficientnet-pytorch",
        "segmentation-models-pytorch",
        "timm",
        "torchvision",
        "transformers",
        "ultralytics",
    )
} | {"open_clip": "open_clip_torch", "pl_bolts": "lightning-bolts"}
"""Packages by the name that they are imported by. The module of a user may have the name of a stranger's package."""


class ScriptClassError(InputError):
    """A file names a class of the script or notebook that wrote it. The advice is for a pickle."""

    def __init__(self, name: str) -> None:
        self.name = name
        leaf = name.rpartition(".")[2]
        super().__init__(
            f"The file names {name}, a class of the script or notebook that saved it.",
            "A class is found by the module that defines it, and here that script is not running.",
            f"the class {leaf} in a module, say nets.py, and there torch.save(model.state_dict(), 'model.pt'); then "
            f'that file with arch="nets:{leaf}"',
        )


def resolve(name: str, trust: tuple[str, ...] = ()) -> Any:
    """The object that ``package.module.Name`` stands for.

    Raises ``InputError`` for a name that is not allowed, without importing its module; the error says which package to
    trust, or that trusting it would not help.
    """
    module, _, leaf = name.rpartition(".")
    package = OWN_CLASSES_OF.get(module, module.partition(".")[0])
    if module in OWN_CLASSES_OF and package in trust:
        value = _imported(name, module, leaf)
        if _is_harmless(value, module, leaf):
            return value
        raise _refused(name, "it is not a class of layers")
    if package in trust and package not in DATA_NAMES and not _can_run_commands(package):
        return _from_trusted(name, module, leaf, package)
    if name in PLAIN_NAMES or name in TORCH_FUNCTIONS or (package in trust and name in DATA_NAMES.get(package, ())):
        return _imported(name, module, leaf)
    if _is_functional(name):
        return _imported(name, module, leaf)
    if any(_within(module, parent) for parent in (*LAYER_MODULES, *ARITHMETIC_MODULES)):
        value = _imported(name, module, leaf)
        if _is_harmless(value, module, leaf):
            return value
        raise _refused(name, "it is not a class of layers")
    if _can_run_commands(package) and name not in DATA_NAMES.get(package, ()):
        raise _refused(name, f"{package!r} holds commands, so it can't be trusted as a whole")
    raise _untrusted(name, package, trust)


def trusted(trust: str | Iterable[str]) -> tuple[str, ...]:
    """The packages that the user trusts; one string is one package.

    Raises ``InputError`` for a package that cannot be trusted as a whole: it would allow a file to run anything.
    """
    packages = (trust,) if isinstance(trust, str) else tuple(trust)
    for package in packages:
        if _can_run_commands(package) and package not in DATA_NAMES:
            raise InputError(
                f'trust=["{package}"] would let a file run anything.',
                "A package of your own, or one of: " + ", ".join(DATA_NAMES) + " (their data classes only).",
                'trust=["mypackage"]',
            )
    return packages


def name_of(value: Any) -> str | None:
    """The name by which ``resolve`` finds a class or function again, if its package is trusted; else ``None``."""
    module, leaf = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    if inspect.isbuiltin(value):  # of compiled code: its module is not the one that it is imported from
        homes = {f"torch.{value.__name__}": torch, f"torch.nn.functional.{value.__name__}": F}
        found = (name for name, home in homes.items() if getattr(home, value.__name__, None) is value)
        return next((name for name in found if name in TORCH_FUNCTIONS or _is_functional(name)), None)
    if not _can_run_commands(module.partition(".")[0]):
        return f"{module}.{leaf}" if getattr(sys.modules.get(module), leaf, None) is value else None
    try:
        return f"{module}.{leaf}" if resolve(f"{module}.{leaf}") is value else None
    except InputError:
        return None


def _is_functional(name: str) -> bool:
    """A compiled function of ``torch.nn.functional``: arithmetic, as are its Python functions."""
    module, _, leaf = name.rpartition(".")
    compiled = inspect.isbuiltin(vars(F).get(leaf))
    return module == "torch.nn.functional" and compiled and not leaf.startswith("_")


def _can_run_commands(package: str) -> bool:
    """The package holds functions that run commands or load code, and is installed on every machine."""
    return package in sys.stdlib_module_names - {"__main__"} or package in ("", "torch", "torchvision", "timm", "numpy")


def _within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def _is_harmless(value: Any, module: str, leaf: str) -> bool:
    if getattr(value, "__module__", None) != module or getattr(value, "__qualname__", None) != leaf:
        return False  # imported into this module from one that is not on the list
    if inspect.isclass(value):
        known = issubclass(value, (nn.Module, enum.Enum))
        return known or any(_within(module, parent) for parent in HELPER_MODULES)
    return inspect.isfunction(value) and module in ARITHMETIC_MODULES


def _from_trusted(name: str, module: str, leaf: str, package: str) -> Any:
    value = _imported(name, module, leaf)
    home = str(getattr(value, "__module__", "")).partition(".")[0]
    if home != package or not (inspect.isclass(value) or inspect.isfunction(value)):
        raise _refused(name, f"{package!r} only imports it from elsewhere")
    return value


def _imported(name: str, module: str, leaf: str) -> Any:
    try:
        return getattr(importlib.import_module(module), leaf)
    except (ImportError, AttributeError) as error:
        if module == "__main__":
            raise ScriptClassError(name) from error
        raise InputError(
            f"The file names {name}, which cannot be imported: {error}.",
            "What defines it must be importable here, in a version that still has that name.",
            import_advice(module.partition(".")[0]),
        ) from error


def import_advice(package: str) -> str:
    """What to do where a name of ``package`` cannot be imported. Only known packages are to be installed."""
    if importlib.util.find_spec(package) is not None:
        return f"a version of {package} that has it"
    if package in _PUBLISHED:
        return f"pip install {_PUBLISHED[package]}"
    return f"PYTHONPATH=FOLDER in front of the command: the folder that holds {package}"


def _refused(name: str, reason: str) -> InputError:
    return InputError(
        f"The file names {name}: {reason}.",
        "A file may name what builds layers; nothing else in it is run.",
        "torch.save(model.state_dict(), 'model.pt') where the model was made",
    )


def trust_advice(package: str, trust: tuple[str, ...]) -> str:
    """``trust=`` with one package more."""
    return "trust=[" + ", ".join(f'"{one}"' for one in dict.fromkeys((*trust, package))) + "]"


def _untrusted(name: str, package: str, trust: tuple[str, ...]) -> InputError:
    if package == "__main__":
        return ScriptClassError(name)
    return InputError(
        f"The file names {name}, code of the package {package!r}.",
        "Without trust= only layers of torch.nn, torchvision and timm are imported.",
        f"{trust_advice(package, trust)}, or save the weights alone: model.state_dict()",
    )
