"""Peak memory against sums by hand, latency against a layer that sleeps, the original against the trained weights."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity

from condconv_surgery import CondConv, ODConv, convert
from condconv_surgery.layers import conditional_layers
from condconv_surgery.native import kernels
from condconv_surgery.reporting import profile
from condconv_surgery.reporting.measure.latency import Latency, measure_latency
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.measure.memory_and_latency import Cost, measure_cost
from condconv_surgery.reporting.measure.original_model import Original
from condconv_surgery.reporting.measure.peak_activations import peak_activations
from condconv_surgery.reporting.render.answers import report_answer
from condconv_surgery.reporting.render.table_rows import latency_line, tiles
from tests.variant_cases import EVERY_VARIANT


def test_the_latency_of_an_unconverted_network_has_no_original() -> None:
    cost = Cost((), (Latency(1, 0.01, 0.001, 0.01, 1.0, 5, 2),), (("threads", "1"),))
    assert latency_line(cost, True).startswith("Latency: medians, original and model alternating in one run after 2")
    assert latency_line(cost, False) == (
        "Latency: medians after 2 warm-up passes; interquartile range 10% of 5 at batch 1; threads 1."
    )


@pytest.mark.parametrize(("spread", "doubt"), [(0.004, ""), (0.02, " (uncertain: passes varied by 200%)")])
def test_a_ratio_of_latencies_that_vary_much_is_called_uncertain(spread: float, doubt: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    example = torch.zeros(1, 3, 8, 8)
    profiled = profile(convert(plain, CondConv(2), example=example).model, example)
    model = Measurements("net", profiled, Cost((), (Latency(1, 0.01, spread, 0.02, 0.5, 7, 2),), ()))
    assert f" and 0.50 times the latency{doubt}. " in report_answer(model)
    (tile,) = [note for name, _, note in tiles(model) if name == "latency"]
    assert tile == ("x0.50 vs original, uncertain" if doubt else "x0.50 vs original")


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_the_original_computes_what_the_trained_network_computes(variant: object) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None).eval()
    options = {"include": ["layer4.*", "fc"], "classifier": True, "example": torch.randn(2, 3, 64, 64)}
    model = convert(plain, variant, **options).model  # type: ignore[arg-type]
    x = torch.randn(2, 3, 64, 64)
    layers = conditional_layers(model)
    with torch.no_grad(), Original(model).in_place():
        assert not conditional_layers(model)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert conditional_layers(model) == layers


def test_peak_of_a_chain_is_two_neighbours() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    x = torch.randn(2, 3, 32, 32)
    wide, narrow = 2 * 16 * 32 * 32 * 4, 2 * 4 * 32 * 32 * 4
    assert peak_activations(chain, (x,)) == 2 * wide  # the convolution's output and the ReLU's
    chain[1] = nn.ReLU(inplace=True)
    assert peak_activations(chain, (x,)) == wide + narrow


def test_peak_is_the_same_on_meta_and_for_real() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if float(x.sum()) != 0.5 else -x)  # needs a value: not on meta

    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)]
    x = torch.randn(2, 3, 32, 32)
    assert peak_activations(Branching(*layers), (x,)) == peak_activations(nn.Sequential(*layers), (x,))


def test_mixed_kernels_are_in_the_peak_of_one_image() -> None:
    plain = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    model = convert(plain, CondConv(4), skip_stem=False, example=torch.randn(1, 64, 8, 8)).model
    (peak, *_) = measure_cost(model, torch.randn(1, 64, 8, 8), batch=1).peaks
    assert peak.before == 64 * 8 * 8 * 4
    assert peak.after >= peak.before + 64 * 64 * 9 * 4


def allocated(model: nn.Module, x: torch.Tensor) -> int:
    """Peak bytes that torch's allocator handed out in a forward pass, by its own log."""
    cpu = [ProfilerActivity.CPU]  # acc_events: without it torch 2.10 warns that it clears the events of each cycle
    with torch.no_grad(), torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        model(x)
    assert profiler.profiler is not None
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("variant", [None, CondConv(4), ODConv(4), ODConv(1)], ids=str)
def test_peak_equals_the_allocators_log(variant: CondConv | ODConv | None) -> None:
    """Within 0.3 MB, by torch's operators. Mixed kernels are most of it, up to 10 MiB at a time."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(16, 3, 64, 64)
    if variant is not None:
        model = convert(model, variant, prove=False).model
        assert peak_activations(model, (x,)) > 512 * 512 * 9 * 4
        with kernels(on=False):
            assert peak_activations(model, (x,)) == pytest.approx(allocated(model, x), abs=0.3e6)
        assert allocated(model, x) <= peak_activations(model, (x,)) + 0.3e6  # the compiled kernels mix in the cache
    else:  # a plain convolution of oneDNN also copies its weights into another order: 1.8 MB here
        assert 0 <= allocated(model, x) - peak_activations(model, (x,)) < 2e6


def test_larger_batches_take_more() -> None:
    model = convert(torchvision.models.resnet18(weights=None).eval(), ODConv(2), prove=False).model
    one, eight = measure_cost(model, torch.randn(1, 3, 64, 64), batch=8).peaks
    assert (one.batch, eight.batch) == (1, 8)
    assert eight.before == pytest.approx(8 * one.before, rel=0.01)
    assert eight.after >= eight.before * 0.99
    assert one.after > 512 * 512 * 9 * 4, "the largest mixed kernel"


def test_latency_is_a_ratio_within_one_run() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.002 if type(self.body) is nn.Conv2d else 0.006)
            return self.body(x)

    model = convert(Slow(), CondConv(2), skip_stem=False, example=torch.randn(1, 3, 4, 4), prove=False).model
    found = measure_latency(model, (torch.empty(2, 3, 4, 4, device="meta"),), 2, seconds=0.1)
    assert found.original >= 0.002
    assert found.median >= 0.006
    assert found.ratio == found.median / found.original > 1.2
    assert found.repeats >= 5
    assert found.spread >= 0
    assert conditional_layers(model), "the conditional layers are back"
