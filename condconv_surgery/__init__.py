"""Convert trained convolutional networks to conditional convolutions.

    >>> import condconv_surgery as cs
    >>> cs.CondConv(experts=8)
    CondConv(experts=8, routing='layer')

``plan`` shows which layers ``convert`` replaces, ``save`` and ``load`` write and read the result as one file,
``check_data`` describes images, ``finetune`` trains it, ``report`` measures it, ``predict`` gives its predictions, and
``compare`` says whether conversion pays. ``load_model`` builds a model from a name or a file, ``set_temperature`` sets
the temperature of all routers, ``native.enable()`` switches to compiled kernels.

The names below are loaded when first used: importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from condconv_surgery.errors import DamagedFileError, InputError, ProofError, SurgeryError, TrainingError
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, TrainingOptions

if TYPE_CHECKING:
    from condconv_surgery import native
    from condconv_surgery.data.data_check import check_data
    from condconv_surgery.deploy import collapse, export, fold, round_experts
    from condconv_surgery.layers import set_temperature
    from condconv_surgery.models.delta_base import load, save
    from condconv_surgery.models.mobilenet_v1 import mobilenet_v1
    from condconv_surgery.models.sources import load_model
    from condconv_surgery.reporting import predict, report
    from condconv_surgery.sharing import from_pretrained, push_to_hub, save_pretrained
    from condconv_surgery.studies import compare
    from condconv_surgery.surgery import Conversion, Plan, convert, plan
    from condconv_surgery.training import finetune

__version__ = "0.1.0"

_LAZY = {
    "Conversion": "condconv_surgery.surgery",
    "Plan": "condconv_surgery.surgery",
    "check_data": "condconv_surgery.data.data_check",
    "collapse": "condconv_surgery.deploy",
    "compare": "condconv_surgery.studies",
    "convert": "condconv_surgery.surgery",
    "export": "condconv_surgery.deploy",
    "finetune": "condconv_surgery.training",
    "fold": "condconv_surgery.deploy",
    "from_pretrained": "condconv_surgery.sharing",
    "load": "condconv_surgery.models.delta_base",
    "load_model": "condconv_surgery.models.sources",
    "mobilenet_v1": "condconv_surgery.models.mobilenet_v1",
    "plan": "condconv_surgery.surgery",
    "predict": "condconv_surgery.reporting",
    "push_to_hub": "condconv_surgery.sharing",
    "report": "condconv_surgery.reporting",
    "round_experts": "condconv_surgery.deploy",
    "save": "condconv_surgery.models.delta_base",
    "save_pretrained": "condconv_surgery.sharing",
    "set_temperature": "condconv_surgery.layers",
}
"""The module of each name that needs torch."""

__all__ = [
    "CondConv",
    "Conversion",
    "DamagedFileError",
    "DynamicConv",
    "InputError",
    "ODConv",
    "Plan",
    "ProofError",
    "SurgeryError",
    "TrainingError",
    "TrainingOptions",
    "__version__",
    "check_data",
    "collapse",
    "compare",
    "convert",
    "export",
    "finetune",
    "fold",
    "from_pretrained",
    "load",
    "load_model",
    "mobilenet_v1",
    "native",
    "plan",
    "predict",
    "push_to_hub",
    "report",
    "round_experts",
    "save",
    "save_pretrained",
    "set_temperature",
]


def __getattr__(name: str) -> Any:
    if name == "native":
        return importlib.import_module("condconv_surgery.native")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
