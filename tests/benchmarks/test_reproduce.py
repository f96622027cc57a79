"""A page states no figure that the benchmarks do not measure again, and no figure is taken on a busy machine."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks import protocol as protocols
from benchmarks import reproduce
from benchmarks.__main__ import main
from benchmarks.model_times import contender_steps
from benchmarks.protocol import MIN_REPEATS, OtherLoad, Protocol, Spread
from benchmarks.timing import use_clock
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import CondConv

README = reproduce.PAGES["README"].read_text(encoding="utf-8")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process, and no wait to see that."""
    monkeypatch.setattr(OtherLoad, "cores", lambda self: 0.0)
    monkeypatch.setattr(protocols, "SECONDS_BEFORE", 0.0)
    monkeypatch.setattr(protocols, "keep_pages", lambda: None)


def test_every_figure_of_the_readme_is_measured() -> None:
    cells = reproduce.stated_numbers(README)
    assert {cell.column for cell in cells} == set(reproduce.MODELS)
    assert len(cells) == 2 * len(reproduce.ROWS)
    assert {reproduce.measure_of(cell.row) for cell in cells} == set(reproduce.ROWS.values())


def test_a_figure_that_nobody_measures_is_an_error_before_anything_is_measured() -> None:
    page = README.replace("| MACs per image", "| energy per image")
    with pytest.raises(InputError, match=r"nothing measures: 'energy per image(.|\n)*ROWS in benchmarks/reproduce.py"):
        next(reproduce.reproduce(page, Protocol()))
    with pytest.raises(InputError, match="no table of models"):
        next(reproduce.reproduce("no table", Protocol()))


@pytest.mark.parametrize("column", reproduce.MODELS)
def test_what_is_counted_is_what_the_readme_states(column: str) -> None:
    (cell,) = [c for c in reproduce.stated_numbers(README) if c.row.startswith("MACs") and c.column == column]
    stated, counted = (
        [float(value) for value in text.replace(" M", "").split(", ")]
        for text in (cell.text, reproduce._macs(reproduce.MODELS[column], Protocol()))
    )
    assert counted == pytest.approx(stated, rel=0.01)  # the papers round


@pytest.mark.usefixtures("quiet")
def test_times_are_ratios_with_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, variants: object, batch: int, mode: str) -> object:
        return contender_steps("mobilenet_v2", {"condconv4": CondConv(experts=4)}, 2, mode, pixels=32)

    monkeypatch.setattr(reproduce, "contender_steps", small)
    text = reproduce._without_kernels("mobilenet_v2", Protocol(threads=1))
    assert len(text.split(", ")) == len(reproduce.MODES)
    for part in text.split(", "):
        median, lower, upper = map(float, part.replace("(", " ").replace("-", " ").replace(")", "").split())
        assert 0 < lower <= median <= upper


@pytest.mark.usefixtures("quiet")
def test_a_measurement_takes_turns_and_compares_within_a_turn() -> None:
    calls: list[str] = []

    def step(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    found = Protocol(threads=1).measure({"a": lambda: step("a", 0.002), "b": lambda: step("b", 0.006)})
    turns = calls[len(calls) - 2 * MIN_REPEATS :]
    assert turns == ["a", "b"] * MIN_REPEATS
    assert found.ratios["a"] == Spread(1.0, 1.0, 1.0)
    assert found.ratios["b"].median > 1.2
    assert found.seconds["b"].lower >= 0.006
    assert found.repeats == MIN_REPEATS
    assert torch.get_num_threads() == found.threads == 1


def test_a_spread_is_a_median_between_its_quartiles() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert Spread.of(values) == Spread(2.0, statistics.median(values), 4.0)
    assert str(Spread.of(values)) == "3.00 (2.00-4.00)"


@pytest.mark.parametrize(("loads", "when"), [([0.5], "before"), ([0.0, 0.5], "during")])
def test_a_busy_machine_is_refused(loads: list[float], when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherLoad, "cores", lambda self: loads.pop(0))
    monkeypatch.setattr(protocols, "SECONDS_BEFORE", 0.0)
    monkeypatch.setattr(protocols, "keep_pages", lambda: None)
    with pytest.raises(InputError, match=rf"used 0.50 cores {when} the measurement(.|\n)*--max-others 0.6"):
        Protocol(threads=1).measure({"a": lambda: None})


def test_fewer_repeats_than_quartiles_need_are_refused() -> None:
    with pytest.raises(InputError, match="A figure of 3 repeats"):
        Protocol(repeats=3)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_own_work_is_not_the_load_of_others() -> None:
    watch = OtherLoad()
    stop = time.process_time() + 0.3
    while time.process_time() < stop:
        pass
    busy = protocols._busy_seconds() - watch._busy
    assert protocols._own_seconds() - watch._own >= 0.25
    assert watch.cores() <= busy / 0.3


def test_the_command_refuses_a_busy_machine_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(OtherLoad, "cores", lambda self: 1.5)
    monkeypatch.setattr(protocols, "SECONDS_BEFORE", 0.0)
    monkeypatch.setattr(protocols, "keep_pages", lambda: None)
    measure = {start: lambda model, protocol: protocol.measure({"a": lambda: None}) for start in reproduce.ROWS}
    monkeypatch.setattr(reproduce, "ROWS", measure)
    with pytest.raises(SystemExit, match=r"Error: Other processes used 1.50 cores"):
        main(["reproduce", "README", "--threads", "1", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_fixed_cost_of_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    try:
        main(["overhead", "--clock", "cpu", "--repeats", "5", "--out", str(tmp_path)])
    finally:
        use_clock("wall")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["condconv4", "odconv1", "odconv4"]
    assert all(float(line.split()[1]) > 1.0 for line in lines)
    assert len(list(tmp_path.glob("*overhead.json"))) == 1


@pytest.mark.usefixtures("quiet")
def test_the_command_prints_stated_against_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = dict.fromkeys(reproduce.ROWS, lambda model, protocol: f"{model} {protocol.repeats} {protocol.threads}")
    monkeypatch.setattr(reproduce, "ROWS", rows)
    main(["reproduce", "README", "--threads", "1", "--repeats", "6", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "MobileNetV2: stated 301 M, 329 M; measured mobilenet_v2 6 1" in out
    assert out.count("stated") == 2 * len(rows)
    (written,) = tmp_path.glob("*.json")
    assert '"measured": "resnet50 6 1"' in written.read_text()
