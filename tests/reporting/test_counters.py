"""Predictions of other counters: against recorded outputs, and against the counters that are installed."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from condconv_surgery import CondConv, DynamicConv, ODConv, convert
from condconv_surgery.recipe import InputSpec, Variant
from condconv_surgery.reporting.measure.other_counters import predicted
from condconv_surgery.reporting.measure.profile import profile
from condconv_surgery.reporting.render.table_rows import other_counters

# fvcore 0.1.5.post20221221, thop 0.1.1.post2209072238, ptflops 0.7.5, torchinfo 1.8.0 on an image of 64 pixels
PRINTED: dict[tuple[str, Variant | None], dict[str, int]] = {
    ("resnet18", None): {"fvcore": 148965376, "thop": 149371392, "ptflops": 149476328, "torchinfo": 148568424},
    ("resnet18", CondConv(4)): {"fvcore": 193610752, "thop": 10974720, "ptflops": 55709748, "torchinfo": 10171828},
    ("resnet18", ODConv(4)): {"fvcore": 193872624, "thop": 11045376, "torchinfo": 10242408},
    ("resnet18", DynamicConv(4)): {"fvcore": 193904384, "thop": 11268352, "ptflops": 56005300, "torchinfo": 10466420},
    ("mobilenet_v2", None): {"fvcore": 26823936, "thop": 27909120, "ptflops": 27323368, "torchinfo": 25763624},
    ("mobilenet_v2", CondConv(4)): {"fvcore": 35642624, "thop": 4408448, "ptflops": 12578484, "torchinfo": 2263156},
    ("mobilenet_v2", ODConv(4)): {"fvcore": 36994088, "thop": 4946176, "torchinfo": 2800680},
}
MARGIN = {"fvcore": 0.005, "thop": 0.005, "torchinfo": 0.02, "ptflops": 0.05}


def network(name: str, variant: Variant | None) -> nn.Module:
    plain = torchvision.models.get_model(name, weights=None).eval()
    return plain if variant is None else convert(plain, variant, example=torch.randn(1, 3, 64, 64), prove=False).model


@pytest.mark.parametrize(("name", "variant"), PRINTED, ids=str)
def test_predicts_what_other_counters_printed(name: str, variant: Variant | None) -> None:
    found = predicted(profile(network(name, variant), InputSpec(height=64, width=64)))
    printed = PRINTED[name, variant]
    assert set(printed) == set(found)
    for counter, macs in printed.items():
        assert found[counter] == pytest.approx(macs, rel=MARGIN[counter]), counter


def counted_by(counter: str, model: nn.Module, x: torch.Tensor) -> float:
    module: Any = importlib.import_module("fvcore.nn" if counter == "fvcore" else counter)
    if counter == "fvcore":
        analysis = module.FlopCountAnalysis(model, x)
        return float(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())
    if counter == "thop":
        return float(module.profile(model, (x,), verbose=False)[0])
    if counter == "torchinfo":
        return float(module.summary(model, input_data=x, verbose=0).total_mult_adds)
    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    return float(module.get_model_complexity_info(model, tuple(x.shape[1:]), **options)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("counter", MARGIN)
def test_the_counter_itself(counter: str) -> None:
    pytest.importorskip(counter)
    for variant in (None, CondConv(4), DynamicConv(3)):
        model = network("mobilenet_v2", variant)
        found = predicted(profile(model, InputSpec(height=64, width=64)))
        printed = counted_by(counter, copy.deepcopy(model), torch.randn(1, 3, 64, 64))
        assert found[counter] == pytest.approx(printed, rel=MARGIN[counter])


def test_torch_itself_prints_twice_ours() -> None:
    model = network("mobilenet_v2", CondConv(4))
    with FlopCounterMode(display=False) as meter, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert meter.get_total_flops() == 2 * profile(model, InputSpec(height=64, width=64)).macs.total


def test_the_sentence_on_other_counters() -> None:
    spec = InputSpec(height=64, width=64)
    sentence = other_counters(profile(network("resnet18", CondConv(4)), spec))
    assert "torchinfo about 10.2 M MACs, thop 11 M, ptflops 55.2 M (misses the convolution)" in sentence
    assert "ptflops" not in other_counters(profile(network("resnet18", ODConv(1)), spec)), "it counts scales too"
    assert "differ by what they add" in other_counters(profile(network("resnet18", None), spec))
