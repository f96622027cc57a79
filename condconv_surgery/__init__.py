"""Conditional convolutions by surgery on trained models.

    >>> import condconv_surgery as cs
    >>> cs.CondConv(experts=8)
    CondConv(experts=8, routing='layer')

The names below are loaded when first used: importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from condconv_surgery.errors import SurgeryError
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv

if TYPE_CHECKING:
    from condconv_surgery.models.artifact.save_load import load, save
    from condconv_surgery.reporting import report
    from condconv_surgery.surgery import Conversion, convert

__version__ = "0.1.0"

_LAZY = {
    "convert": "condconv_surgery.surgery",
    "Conversion": "condconv_surgery.surgery",
    "load": "condconv_surgery.models.artifact.save_load",
    "save": "condconv_surgery.models.artifact.save_load",
    "report": "condconv_surgery.reporting",
}

__all__ = [
    "CondConv",
    "Conversion",
    "DynamicConv",
    "ODConv",
    "SurgeryError",
    "__version__",
    "convert",
    "load",
    "report",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
