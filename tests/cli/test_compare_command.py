"""``condconv compare``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import condconv_surgery as cs
from condconv_surgery.reporting import StudyReport
from tests.conftest import Run
from tests.images import write_images
from tests.training.test_training_run import StopAt

MODEL = "tests.small_networks:small_net"
QUICK = ("--image-size", 16, "--batch-size", 8, "--workers", 0, "--epochs", 1, "--lr", 0.01)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condconv_surgery.studies.arm_costs.SECONDS", 0.1)
    monkeypatch.setattr("condconv_surgery.studies.step_times.MOST", 2)
    monkeypatch.setattr("condconv_surgery.training.run.draw_curves", lambda rows, path: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data", each=10)


def test_a_study_from_the_command_line(condconv: Run, data: Path, tmp_path: Path) -> None:
    command = ("compare", MODEL, "--data", data, "-o", tmp_path / "study", *QUICK)
    arms = ("--arm", "static", "--arm", "condconv:2,layers.router_lr=2", "--seeds", 1, "--rates", 1)
    code, out, err = condconv(*command, *arms)
    assert code == 0, err
    assert "Run 2 of 2: condconv:2,layers.router_lr=2, learning rate 0.01, seed 1, 1 epoch" in err
    assert err.count("best epoch 1: validation top-1 0.") == 2
    assert "train loss" not in err  # the epochs of each run
    assert "18 training, 6 validation and 6 test images" in err
    assert err.count("Data: ") == 1
    report = StudyReport.read(tmp_path / "study")
    assert report.verdict in " ".join(out.split())
    recipe = (tmp_path / "study/runs/condconv-2-layers.router_lr-2-0.01-1/recipe.toml").read_text()
    assert "router_lr = 2.0" in recipe
    code, out, err = condconv(*command, *arms, "--json")
    assert code == 0, err
    assert json.loads(out)["verdict"] == report.verdict
    assert "Continuing the study" in err
    code, out, err = condconv(*command, *arms, "--lr", 0.02)
    assert (code, out) == (2, "")
    assert "training.optimizer.lr was 0.01 and is 0.02" in err
    assert "another -o STUDY" in err


def test_quick_says_what_limits_the_network(condconv: Run, data: Path, tmp_path: Path) -> None:
    command = ("compare", MODEL, "--data", data, "-o", tmp_path / "study", *QUICK, "--quick")
    code, out, err = condconv(*command)
    assert code == 0, err
    assert "1 epoch " in out
    assert "2 epochs" in out
    assert "no effect" not in err
    code, out, err = condconv(*command, "--json", "--seeds", 1, "--arm", "odconv:1")
    assert code == 0, err
    assert "--quick trains the static network only, twice with one seed: no effect of --arm, --seeds." in err
    found = json.loads(out)
    assert found["limit"] in ("data", "mostly data", "capacity", "not known")
    code, _, err = condconv(*command, "--lr", 0.02)
    assert code == 2
    assert "a new quick check: another -o STUDY" in err
    assert not (tmp_path / "study/study.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_a_signal_ends_a_study_with_its_exit_code(
    condconv: Run,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    quick: tuple[str],
) -> None:
    monkeypatch.setattr("condconv_surgery.training.monitor.progress_display.console_display", lambda: StopAt(2, number))
    before = signal.signal(number, signal.default_int_handler)  # nohup, under which tests may run, ignores SIGHUP
    try:
        given = ("--arm", "static", "--arm", "condconv:2", *quick)
        assert condconv("compare", MODEL, "--data", data, "-o", tmp_path / "study", *QUICK, *given)[0] == code
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "condcon:4"], "Unknown arm 'condcon'"),
        (["--arm", "static"], "Try: --arm static --arm condconv:4"),
        (["--arm", "condconv:4,augment.flip=0"], "--set augment.flip=0 for the whole study"),
        (["--budget", "money"], "--budget steps"),
        (["--seeds", "0"], "--seeds 3"),
        (["--data", "{tmp}/nowhere"], "There is no"),
        (["--set", "data.streaming=true"], "are streamed"),
        (["--epochs", "0"], "schedule.epochs is 0"),
        (["--arm", "condconv:2,include=layer9"], 'Try: --arm "condconv:2,include=inner*"'),
        (["--arm", "condconv:2,include=layer9"], "The arm condconv:2,include=layer9: "),
    ],
)
def test_bad_input_ends_with_exit_code_2(
    condconv: Run, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    code, out, err = condconv("compare", MODEL, "--data", data, "-o", tmp_path / "study", *QUICK, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert "Try: " in err
    assert "Traceback" not in err


def test_what_is_missing_is_said(condconv: Run, data: Path, tmp_path: Path) -> None:
    for given, message in (
        ((), "No model is given"),
        ((MODEL,), "No images are given"),
        ((MODEL, "--data", data), "No output folder is given"),
    ):
        code, _, err = condconv("compare", *given)
        assert code == 2
        assert message in err
        assert "Try: condconv compare MODEL --data FOLDER -o STUDY" in err


def test_a_converted_model_is_refused(condconv: Run, data: Path, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    net = torch.nn.Sequential(net, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    converted = cs.convert(net, cs.CondConv(2), example=torch.randn(2, 3, 16, 16)).model
    cs.save(converted, tmp_path / "converted.safetensors")
    code, _, err = condconv("compare", tmp_path / "converted.safetensors", "--data", data, "-o", tmp_path / "study")
    assert code == 2
    assert "converted already" in err
