from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from condconv_surgery.cli.main import app
from typer.testing import CliRunner

import condconv_surgery as cs
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import TrainingOptions, recipe_of
from condconv_surgery.recipe.option_rules import all_rules
from condconv_surgery.reporting.images.recorded_accuracy import recorded_accuracy
from tests.conftest import Run
from tests.images import write_images
from tests.training.forked import command_line, forked


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=6)


QUICK = ("--image-size", 32, "--batch-size", 6, "--workers", 0, "--epochs", 2)
NET = torchvision.models.mobilenet_v3_small()
PLAIN = ("torchvision:mobilenet_v3_small", "--weights", "none")


def test_a_plain_model_is_trained(condconv: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = condconv("finetune", *PLAIN, "--data", data, "-o", run, *QUICK, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["epochs"], result["train_images"], result["val_images"]) == (2, 15, 3)
    assert result["heads"] == {"classifier.3": 3}
    assert {"last.safetensors", "best.safetensors", "metrics.jsonl", "recipe.toml"} <= {p.name for p in run.iterdir()}
    assert "epoch   2  train loss" in err
    assert "Model: torchvision:mobilenet_v3_small, 1,520,931 parameters; fp32 on cpu." in err
    assert err.splitlines()[-1] == f"Next: condconv report {run}/best.safetensors --data {run}"
    model = cs.load(run / "best.safetensors")
    of_run = load_model(str(run)).state_dict()  # a run directory stands for its best model
    assert all(torch.equal(tensor, of_run[name]) for name, tensor in model.state_dict().items())
    recorded = recorded_accuracy(run)
    assert recorded is not None
    assert (recorded.top1, recorded.images) == (result["best_top1"], 3)
    recipe = recipe_of(model)
    assert recipe is not None
    assert recipe.classes == ("class0", "class1", "class2")
    assert (recipe.input.height, recipe.heads) == (32, {"classifier.3": 3})
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("variant", [cs.CondConv(experts=2), cs.ODConv(experts=2), cs.DynamicConv(experts=2)], ids=str)
@pytest.mark.parametrize("classifier", [False, True])
def test_a_converted_model_is_trained_and_loads_again(
    condconv: Run, data: Path, tmp_path: Path, variant: object, classifier: bool
) -> None:
    plain = load_model("torchvision:resnet18", weights="none")
    conversion = cs.convert(
        plain,
        variant,  # type: ignore[arg-type]
        include=["layer1.0.*", "fc"],
        classifier=classifier,
        example=torch.randn(8, 3, 64, 64),
    )
    cs.save(conversion.model, tmp_path / "m.safetensors")
    train = ("finetune", tmp_path / "m.safetensors", "--data", data, "-o", tmp_path / "run", *QUICK)
    code, out, err = condconv(*train, "--temperature", 30, "--json")
    assert code == 0, err
    assert json.loads(out)["heads"] == {"fc": 3}
    model = cs.load(tmp_path / "run/last.safetensors")
    recipe = recipe_of(model)
    assert recipe is not None
    assert len(recipe.layers) == 2 + classifier
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_trained_model_is_trained_again(condconv: Run, data: Path, tmp_path: Path) -> None:
    assert condconv("finetune", *PLAIN, "--data", data, "-o", tmp_path / "one", *QUICK)[0] == 0
    more = write_images(tmp_path / "more", classes=4)
    code, out, err = condconv("finetune", tmp_path / "one", "--data", more, "-o", tmp_path / "two", *QUICK, "--json")
    assert code == 0, err
    assert json.loads(out)["heads"] == {"classifier.3": 4}
    assert cs.load(tmp_path / "two/best.safetensors")(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_a_file_of_half_precision_is_trained_in_whole(condconv: Run, data: Path, tmp_path: Path) -> None:
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in NET.state_dict().items()}, tmp_path / "half.pt")
    how = ("--arch", "torchvision:mobilenet_v3_small", "--data", data, "-o", tmp_path / "run", *QUICK)
    code, _, err = condconv("finetune", tmp_path / "half.pt", *how)
    assert code == 0, err
    assert load_model(f"{tmp_path}/run/last.safetensors").classifier[3].weight.dtype == torch.float32  # type: ignore[index, union-attr]


def test_a_run_is_repeated_from_its_recipe_alone(condconv: Run, data: Path, tmp_path: Path) -> None:
    flags = ("--optimizer", "sgd", "--lr", 0.05, "--freeze", "features.0*", "--set", "augment.flip=0", "--ema", 0.5)
    assert condconv("finetune", *PLAIN, "--data", data, "-o", tmp_path / "one", *QUICK, *flags)[0] == 0
    again = ("finetune", "--recipe", tmp_path / "one/recipe.toml", "-o", tmp_path / "two")
    code, _, err = condconv(*again)
    assert code == 0, err
    one, two = (cs.load(tmp_path / name / "last.safetensors").state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, out, _ = condconv(*again, "--print-recipe", "--lr", 0.1)
    assert code == 0
    assert 'name = "sgd"' in out
    assert "lr = 0.1 " in out


def test_resume_needs_the_folder_alone(condconv: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert condconv("finetune", *PLAIN, "--data", data, "-o", run, *QUICK)[0] == 0
    code, out, err = condconv("finetune", "-o", run, "--resume", "--epochs", 3, "--json")
    assert code == 0, err
    assert json.loads(out)["epochs"] == 3
    assert "Resuming after step 4, epoch 2" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}/nowhere"], "There is no"),
        (["--data", "{tmp}/empty"], "no images"),
        (["--data", "{tmp}/one"], "one class only"),
        (["--data", "{data}", "--epochs", "0"], "schedule.epochs is 0"),
        (["--data", "{data}", "--lr", "-1"], "optimizer.lr is -1"),
        (["--data", "{data}", "--batch-size", "0"], "--batch-size 32"),
        (["--data", "{data}", "--set", "optimizer.larning_rate=3"], "Unknown option in [optimizer] 'larning_rate'"),
        (["--data", "{data}", "--optimizer", "adamx"], "Unknown optimizer 'adamx'"),
        (["--data", "{data}", "--precision", "fp8"], "one of: fp32, bf16, fp16"),
        (["--data", "{data}", "--freeze", "layer9"], "matches none of"),
        (["--data", "{data}", "--warm-routers", "1"], "without routers"),
        (["--data", "{data}", "--recipe", "{tmp}/none.toml"], "none.toml cannot be read"),
        (["--data", "{data}", "-o", "/proc/run"], "/proc/run cannot be written"),
        (["--data", "{data}", "--distill", "start"], "is new and untrained"),
        (["--data", "{data}", "--image-size", "2"], "leave --image-size out"),
        (["--data", "{data}", "--temperature", "0"], "leave --temperature out"),
        ([], "No images are given"),
    ],
)
def test_bad_input_ends_in_words_with_nothing_written(
    condconv: Run, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one", classes=1)
    given = [a.replace("{tmp}", str(tmp_path)).replace("{data}", str(data)) for a in arguments]
    code, out, err = condconv("finetune", *PLAIN, "-o", tmp_path / "run", *QUICK, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert "Try: " in err
    assert "Traceback" not in err
    written = {p.name for p in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert written <= {"recipe.toml"}


def test_resume_without_a_run_or_a_model_says_how_to_begin_one(condconv: Run, tmp_path: Path) -> None:
    code, _, err = condconv("finetune", "-o", tmp_path / "nothing", "--resume")
    assert code == 2
    assert "recipe.toml cannot be read: No such file or directory.\n" in err
    assert f"Try: condconv finetune MODEL --data FOLDER -o {tmp_path / 'nothing'}\n" in err


def test_a_missing_model_a_corrupt_image_and_a_used_folder(condconv: Run, data: Path, tmp_path: Path) -> None:
    code, _, err = condconv("finetune", tmp_path / "no.safetensors", "--data", data, "-o", tmp_path / "run")
    assert code == 2
    assert "no.safetensors" in err
    code, _, err = condconv("finetune", "--data", data, "-o", tmp_path / "run")
    assert (code, "No model is given" in err) == (2, True)
    assert "Try: condconv finetune MODEL --data FOLDER -o RUN\n" in err
    code, _, err = condconv("finetune", "-o", tmp_path / "run", "--resume")
    assert (code, "recipe.toml cannot be read" in err) == (2, True)
    bad = data / "class1/03.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    code, _, err = condconv("finetune", *PLAIN, "--data", data, "-o", tmp_path / "run", *QUICK)
    assert code == 2
    assert str(bad) in err
    assert "--max-bad" in err
    code, _, err = condconv(
        "finetune", *PLAIN, "--data", data, "-o", tmp_path / "run", *QUICK, "--max-bad", 1, "--resume"
    )
    assert code == 0, err
    assert f"Unreadable, skipped: {bad}" in err
    code, _, err = condconv("finetune", *PLAIN, "--data", data, "-o", tmp_path / "run", *QUICK)
    assert (code, "already holds a run" in err) == (2, True)


def test_help_shows_each_flag_of_the_rules_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    lines = CliRunner().invoke(app, ["finetune", "--help"]).output.splitlines()
    defaults = TrainingOptions()
    for path, rule in all_rules(TrainingOptions).items():
        if not rule.flag:
            continue
        (line,) = [line for line in lines if f" {rule.flag} " in line]
        section, _, name = path.rpartition(".")
        default = getattr(getattr(defaults, section) if section else defaults, name)
        assert rule.help[1:] in line
        assert (f"[default: {default}]" in line) == (default not in (None, "", ())), line
        assert all(choice in line for choice in rule.choices)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--epochs", 10], "epochs = 10 "),  # the default, typed: it overrides the file
        (["--lr", "2"], "lr = 2.0 "),
        (["--freeze", "a", "--freeze", "b*"], 'freeze = ["a", "b*"] '),
        (["--data", "x", "--set", "data.folder=y"], 'folder = "y" '),
        (["-o", "run"], 'output = "run" '),
        (["--output", "run"], 'output = "run" '),
        ([], "epochs = 3 "),
        (["--trust", "timm"], 'trust = ["timm"] '),
    ],
)
def test_flags_override_the_recipe_file(condconv: Run, tmp_path: Path, arguments: list[object], line: str) -> None:
    (tmp_path / "r.toml").write_text("[schedule]\nepochs = 3\n")
    code, out, err = condconv("finetune", "--recipe", tmp_path / "r.toml", "--print-recipe", *arguments)
    assert code == 0, err
    assert f"\n{line}" in out


def test_help_and_print_recipe_import_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['condconv', 'finetune', *{}]\n"
        "from condconv_surgery.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for arguments in (["--help"], ["--print-recipe", "m"], ["m", "--epochs", "0"], ["m", "--epochs", "x"], ["--bad"]):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, check=False)
        assert done.returncode == 0, arguments


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_the_whole_group_saves_and_ends_as_documented(
    data: Path, tmp_path: Path, number: int, code: int
) -> None:
    """As a terminal sends Ctrl-C and a cluster SIGTERM: to the reading processes too."""
    run, output = tmp_path / "my run", tmp_path / "output"
    settings = ["--image-size", 32, "--batch-size", 6, "--workers", 2, "--epochs", 5000]
    command = [*map(str, ["finetune", *PLAIN, "--data", data, "-o", run, *settings])]
    process = forked(command_line, command, number, output=output)
    while not (run / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.1)
    os.killpg(process.pid or 0, number)
    process.join(120)
    err = output.read_text()
    assert process.exitcode == code, err
    assert "state saved" in err
    assert f"Resume: condconv finetune -o '{run}' --resume\n" in err
    assert {"state.safetensors", "curves.png"} <= {path.name for path in run.iterdir()}
    assert not (run / "run.lock").exists()
