"""The benchmarks compare like with like: every contender computes the same function. Times are not tested."""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

from benchmarks.__main__ import main
from benchmarks.contenders import TORCH_WAYS, contenders
from benchmarks.geometries.model_geometries import MODELS, QUICK, Site, sites
from benchmarks.geometries.timm_geometries import drawn_sites, kind_of
from benchmarks.layer_times import TOLERANCE, VARIANTS, LayerResult, check_layer
from benchmarks.model_times import roofline
from benchmarks.presenting import geometric_mean, layer_table
from benchmarks.protocol import Measurement, OtherLoad, Spread
from benchmarks.setting import Setting
from benchmarks.timing import interleaved, ratio
from benchmarks.trainer_overhead import main as measure_training
from benchmarks.turns import Loop, process_seconds, take_turns
from condconv_surgery import native
from condconv_surgery.layers import ConvGeometry, conditional_like
from condconv_surgery.recipe import CondConv
from tests.geometries import GEOMETRIES, without_bias

# what timm and the authors support: symmetric zero padding
COMPARABLE = ["3x3", "1x1", "1x1 strided", "1x1 groups", "depthwise", "depthwise strided", "groups", "large kernel"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", COMPARABLE)
def test_every_contender_computes_our_function(name: str, variant: str) -> None:
    site = Site("table", ConvGeometry.make(**without_bias(GEOMETRIES[name])), (12, 12), 1)
    differences = check_layer(site, VARIANTS[variant], batch=3, torch_ways=True)
    assert set(differences) - set(TORCH_WAYS) == {"ours", "loop", "timm" if variant == "condconv4" else "authors"}
    assert bool(set(differences) & set(TORCH_WAYS)) == (variant != "odconv1" or "1x1" not in name)
    assert all(value <= TOLERANCE for value in differences.values()), differences


def test_a_wrong_contender_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site("table", ConvGeometry.make(**without_bias(GEOMETRIES["3x3"])), (12, 12), 1)
    monkeypatch.setattr("benchmarks.contenders.SampleLoop.forward", lambda self, x: 1.01 * self.layer(x))
    assert check_layer(site, CondConv(experts=4), batch=3)["loop"] > TOLERANCE


def test_the_geometries_are_those_of_the_models() -> None:
    found = sites()
    assert {site.model for site in found} == set(MODELS)
    counts = {name: sum(site.count for site in found if site.model == name) for name in MODELS}
    # all convolutions but the stem; EfficientNet-B0's 32 squeeze-excitation ones see a single position
    assert counts == {"resnet18": 19, "resnet50": 52, "mobilenet_v2": 51, "efficientnet_b0": 48}
    assert set(QUICK) <= {str(site) for site in found}


def test_ratios_are_taken_within_a_repeat() -> None:
    times = {"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 3.0]}  # a machine ten times slower for a while
    assert ratio(times, "b", "a") == statistics.median([2.0, 2.0, 1.5])
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order[-4:] == ["a", "b", "a", "b"]


def test_the_floor_counts_every_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.model_times.copy_bandwidth", lambda setting: 1000.0)
    model = conditional_like(torch.nn.Conv2d(5, 10, 1), CondConv(experts=4))  # 4 * 50 floats = 800 bytes
    assert roofline(model, static_seconds=1.0) == pytest.approx(1.8)


def test_the_table_ends_in_geometric_means() -> None:
    results = [result_of(f"layer {of_loop}", loop=of_loop, timm=4.0) for of_loop in (0.5, 8.0)]
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    *_, means, below, slow = layer_table(results).splitlines()
    assert means.endswith("over timm 4.00, over the best other 1.41 worst 0.50")
    assert below == "below 1.0: 1 of 2, by more than the spread: 1"
    assert slow.startswith("layer 0.5 ")
    assert slow.endswith(" 0.50 (0.45-0.55)  loop")


def result_of(site: str, **ratios: float) -> LayerResult:
    """A measured layer, whose contenders take ``ratios`` of our time."""
    by_name = {"ours": 1.0, "static": 2.0, **ratios}
    spreads = {name: Spread(0.9 * value, value, 1.1 * value) for name, value in by_name.items()}
    return LayerResult(site, 1, "condconv4", "eval", Measurement(spreads, spreads, 5, 1, 0.0))


def test_ratios_the_other_way_round_keep_their_order() -> None:
    assert result_of("layer", loop=1.0).against_static == Spread(1 / 2.2, 1 / 2.0, 1 / 1.8)


def test_a_result_survives_its_file() -> None:
    result = result_of("layer", loop=1.0)
    assert LayerResult.from_json(json.loads(json.dumps(result.as_json()))) == result


@pytest.fixture
def few_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a minute of building a model of each family."""
    models = ["mobilenetv3_small_050", "resnext50_32x4d", "inception_v3"]
    monkeypatch.setattr("benchmarks.geometries.timm_geometries._a_model_of_each_family", lambda choose: models)


@pytest.mark.usefixtures("few_families")
def test_geometries_are_drawn_by_a_seed_and_of_every_kind() -> None:
    found = drawn_sites(30, seed=1)
    assert found == drawn_sites(30, seed=1) != drawn_sites(30, seed=2)
    assert len({(site.geometry, site.size) for site in found}) == 30
    kinds = {kind_of(site.geometry) for site in found}
    assert kinds >= {"dense 1x1", "dense 3x3 strided", "dense other", "dense 5x5", "depthwise 5x5", "grouped 3x3"}
    for site in found:  # what the seed drew is what timm's layer computes
        assert site.conv()(torch.empty(0, site.geometry.in_channels, *site.size)).dim() == 4


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes are not watched before a measurement, and memory stays as it is."""
    monkeypatch.setattr("benchmarks.protocol.SECONDS_BEFORE", 0.0)
    monkeypatch.setattr("benchmarks.protocol.keep_pages", lambda: None)


@pytest.fixture
def quiet(no_wait: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process."""
    monkeypatch.setattr(OtherLoad, "cores", lambda self: 0.0)


@pytest.mark.usefixtures("few_families", "quiet")
def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["layers", "--variants", "condconv4", "--batch", "1", "--seconds", "0", "--out", str(tmp_path)]
    command += ["--threads", str(torch.get_num_threads())]
    main([*command, "--generated", "1"])
    (path,) = tmp_path.iterdir()
    first = json.loads(path.read_text())["results"]
    assert {result["mode"] for result in first} == {"eval", "train"}
    main([*command, "--generated", "2", "--resume"])
    both = json.loads(path.read_text())["results"]
    assert both[:2] == first
    assert len(both) == 4
    assert "geometric mean of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"under other conditions: batch(.|\n)*without --resume"):
        main([*command, "--generated", "1", "--resume", "--batch", "2"])


@pytest.mark.usefixtures("no_wait")
def test_a_busy_machine_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherLoad, "cores", lambda self: 1.5)
    for what in ("layers", "models"):
        small = ["--quick", "--models", "resnet18", "--variants", "condconv4", "--batch", "1", "--pixels", "32"]
        small += ["--threads", str(torch.get_num_threads())]
        with pytest.raises(SystemExit, match=r"used 1\.50 cores before(.|\n)*--max-others 1\.6"):
            main([what, *small, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quiet")
def test_the_command_writes_its_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--models", "resnet18", "--variants", "condconv4", "--batch", "1"]
    threads = torch.get_num_threads()
    try:
        main(["layers", *few, "--pixels", "64", "--seconds", "0", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    name = "native-layers.json" if native.is_enabled() else "layers.json"
    written = json.loads((tmp_path / name).read_text())
    assert len(written["results"]) == 2 * len(sites(("resnet18",)))
    assert written["environment"]["torch"] == torch.__version__
    assert "geometric mean of 10" in capsys.readouterr().out


def test_a_setting_places_what_it_measures() -> None:
    setting = Setting("cpu", "bfloat16", channels_last=True)
    layer = setting.place(torch.nn.Conv2d(4, 4, 3))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert setting.place(torch.ones(3)).shape == (3,)
    with setting.precision():
        y = layer(setting.place(torch.randn(2, 4, 5, 5)))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (setting.name, Setting().name) == ("bfloat16-last-", "")


def test_contenders_share_our_router() -> None:
    layer = conditional_like(torch.nn.Conv2d(4, 4, 3), CondConv(experts=2))
    assert all(getattr(other, "layer", layer) is layer for other in contenders(layer).values())


def test_loops_take_turns_and_change_who_is_first() -> None:
    calls: list[str] = []
    loops = {name: Loop(lambda name=name: calls.append(name)) for name in "ab"}  # type: ignore[misc]
    calls.clear()
    turns = take_turns(loops, rounds=3, steps=2)
    assert "".join(calls) == "aabb" + "bbaa" + "aabb"
    assert [len(turns[name]) for name in "ab"] == [3, 3]
    assert all(turn.wall > 0 for turn in turns["a"])


def test_the_time_of_a_process_is_what_it_says_itself() -> None:
    import os
    import time

    while time.process_time() < 0.1:
        pass
    assert process_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.1)


@pytest.mark.slow
def test_the_trainer_is_measured_against_a_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, on noise, with a reader each and an epoch's end in it."""
    threads = torch.get_num_threads()
    sizes = ["--side", "16", "--batch-size", "128", "--rounds", "2", "--steps", "1", "--workers", "1", "--threads", "1"]
    measure_training(["--model", "torchvision:mobilenet_v3_small", *sizes])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    for line, clock in zip(lines, ("wall clock", "processor time"), strict=False):
        assert re.fullmatch(rf"trainer / bare loop, {clock}: \d+\.\d{{3}} in all, \d+\.\d{{3}} in .*\)", line)
    assert re.fullmatch(r"trainer: \d\.\d\d of \d+ cores busy", lines[2])
    assert not multiprocessing.active_children()
