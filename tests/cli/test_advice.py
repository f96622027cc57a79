"""Every ``Try:`` that these mistakes raise is typed: the command then succeeds, or fails for another reason."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from condconv_surgery.cli.main import app
from typer.testing import CliRunner

import condconv_surgery as cs
from tests.cli.advice import advice_in, require_help
from tests.conftest import Run
from tests.images import write_images

NETS = """
import torch
import torch.nn.functional as F
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.wide = nn.Linear(4, 4) if not layers else None

class TwoLayers(nn.Module):
    def __init__(self, cls=nn.Conv2d, **options):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3), cls(8, 8, 3, **options), nn.Linear(8, 3)
    def forward(self, x):
        return self.fc(self.body(self.stem(x).relu()).mean((2, 3)))

class Same(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)

class Scaled(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((1,), 2.0))
    def forward(self, x):
        return super().forward(x) * self.gain

class OnlyStem(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)))

class NoConvolution(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.fc = nn.Linear(3, 3)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))

class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.squeeze, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc((x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3)))

def tiny(): return TwoLayers()
def equivalent(): return TwoLayers(Same)
def twice(): return TwoLayers(Twice)
def scaled(): return TwoLayers(Scaled)
def boxes(): return torch.nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
"""
OUT = ["-o", "out.safetensors", "--input-size", "32"]
LAST = ["--include", "conv5*"]
"""Of a network whose layers all together take seconds to convert."""

State = dict[str, torch.Tensor]


def saved(content: Callable[[], object], *flags: str) -> Callable[[], list[str]]:
    def write() -> list[str]:
        torch.save(content(), "file.pt")
        return ["convert", "file.pt", *OUT, *flags]

    return write


def made(name: str, *flags: str) -> Callable[[], list[str]]:
    return lambda: ["convert", name, *OUT, *flags]


def nets() -> object:
    return importlib.import_module("nets")


def small(**options: int) -> State:
    return torchvision.models.shufflenet_v2_x0_5(weights=None, **options).state_dict()


def without_a_layer() -> State:
    state = small()
    del state["stage2.0.branch1.0.weight"]
    return state


def artifact(*command: str) -> Callable[[], list[str]]:
    def write() -> list[str]:
        model = nets().boxes()  # type: ignore[attr-defined]
        x = torch.zeros(1, 3, 16, 16)
        cs.save(cs.convert(model, cs.CondConv(experts=2), example=x).model, "made.safetensors")
        return list(command)

    return write


def folder_of_weights() -> list[str]:
    Path("hub").mkdir()
    Path("hub/config.json").write_text("{}")
    torch.save(nets().tiny().state_dict(), "hub/pytorch_model.bin")  # type: ignore[attr-defined]
    return ["convert", "hub", "--arch", "nets:tiny", *OUT]


def images(classes: int = 3) -> None:
    write_images(Path("images"), classes=classes, each=4, side=16)


def training(*flags: str) -> Callable[[], list[str]]:
    def write() -> list[str]:
        images()
        run = ["--epochs", "1", "--batch-size", "4", "--image-size", "16", "--workers", "0"]
        return ["finetune", "nets:tiny", "--data", "images", "-o", "run", *run, *flags]

    return write


def over_a_run() -> list[str]:
    command = training()()
    assert CliRunner().invoke(app, command).exit_code == 0
    return command


def collapsing(*flags: str) -> Callable[[], list[str]]:
    def write() -> list[str]:
        images()
        command = artifact("collapse", "made.safetensors", "-o", "plain.safetensors")()
        return [*command, *(flags if "--data" in flags else ("--data", "images", *flags))]

    return write


MISTAKES: dict[str, Callable[[], list[str]]] = {
    "a name without its library": made("shufflenet_v2_x0_5", "--weights", "none", *LAST),
    "a pattern that matches nothing": made("nets:tiny", "--include", "layer5.*"),
    "a pattern that matches the stem": made("nets:tiny", "--include", "stem*"),
    "everything excluded": made("nets:tiny", "--exclude", "*"),
    "too narrow": made("nets:tiny", "--min-channels", "32"),
    "too narrow, and another include": made("nets:tiny", "--min-channels", "32", "--include", "stem*"),
    "only the stem": made("nets:OnlyStem"),
    "only over 1x1 maps": made("nets:Pooled"),
    "no convolution": made("nets:NoConvolution"),
    "no convolution, and classifier excluded": made("nets:NoConvolution", "--classifier", "--include", "body*"),
    "a subclass that computes the same": made("nets:equivalent"),
    "a subclass that does not": made("nets:twice"),
    "a subclass that holds more": made("nets:scaled"),
    "a subclass asserted, which does not": made("nets:twice", "--subclass", "nets.Twice"),
    "a subclass that is not there": made("nets:equivalent", "--subclass", "nets.Some"),
    "blocks without block routing": made("nets:tiny", "--block", "body*"),
    "noise for a start that has none": made("nets:tiny", "--diversity", "0.1"),
    "a start of another variant": made("nets:tiny", "--start", "softmax"),
    "a module of a package that is not trusted": saved(lambda: nets().tiny()),  # type: ignore[attr-defined]
    "a factory that is not there": made("nets:tini"),
    "weights of another architecture": saved(small, "--arch", "torchvision:mobilenet_v2", *LAST),
    "weights of no architecture": saved(without_a_layer),
    "weights of no architecture, with another one": saved(without_a_layer, "--arch", "torchvision:shufflenet_v2_x0_5"),
    "classes that the file has not": saved(
        small, "--arch", "torchvision:shufflenet_v2_x0_5", "--num-classes", "5", *LAST
    ),
    "classes without an architecture": saved(small, "--num-classes", "5", *LAST),
    "a folder with a file": folder_of_weights,
    "weights of another architecture for a name": lambda: [
        *("convert", "torchvision:mobilenet_v2", "--weights", saved(small)()[1], *OUT, *LAST)
    ],
    "classes that the file of a name has not": lambda: [
        *("convert", "torchvision:shufflenet_v2_x0_5", "--num-classes", "5"),
        *("--weights", saved(small)()[1], *OUT, *LAST),
    ],
    "a training state with its options": saved(
        lambda: {"state_dict": small(), "args": argparse.Namespace(lr=1)}, *LAST
    ),
    "an architecture for an artifact": artifact("convert", "made.safetensors", "--arch", "nets:tiny", *OUT),
    "no output": lambda: ["convert", "nets:tiny", "--input-size", "32"],
    "another suffix": lambda: ["convert", "nets:tiny", "--input-size", "32", "-o", "out.pt"],
    "an unknown variant": made("nets:tiny", "--variant", "condcon"),
    "no experts": made("nets:tiny", "--experts", "0"),
    "an input of no size": lambda: ["convert", "nets:tiny", "-o", "out.safetensors", "--input-size", "0"],
    "too small an input": lambda: ["convert", "nets:tiny", "-o", "out.safetensors", "--input-size", "3"],
    "a tolerance below zero": made("nets:tiny", "--tolerance", "-1"),
    "an option of another variant": made("nets:tiny", "--variant", "condconv", "--reduction", "4"),
    "block routing for odconv": made("nets:tiny", "--variant", "odconv", "--routing", "block"),
    "an unknown layout": artifact("export", "made.safetensors", "--layout", "tim", "-o", "out.safetensors"),
    "a form for one image": artifact(
        "export", "made.safetensors", "--to", "pt2", "--input-size", "16", "--form", "kernel", "-o", "out.pt2"
    ),
    "no target of an export": artifact("export", "made.safetensors", "-o", "out.safetensors"),
    "a plain file to import": lambda: saved(small)() and ["import", "file.pt", "-o", "out.safetensors"],
    "an unknown optimizer": training("--optimizer", "adamm"),
    "a learning rate below zero": training("--lr", "-1"),
    "layers that are not there": training("--freeze", "body.conv"),
    "warm routers without routers": training("--warm-routers", "3"),
    "a stream of a folder": training("--set", "data.streaming=true"),
    "sharding in one process": training("--set", "engine.shard=true"),
    "a folder that holds a run": over_a_run,
    "no images to check": lambda: images() or ["check"],
    "no images to check, by a limit": lambda: images() or ["check", "--data", "images", "--limit", "-1"],
    "a batch of no images": artifact("report", "made.safetensors", "--batch", "0"),
    "an unknown dtype": artifact("report", "made.safetensors", "--dtype", "int8"),
    "a layer to keep that is not there": collapsing("--keep", "layer4.*"),
    "fewer than no layers to keep": collapsing("--keep", "-1"),
    "a limit of no images": collapsing("--limit", "0"),
    "a delta in int8": artifact("share", "made.safetensors", "-o", "a.safetensors", "--int8", "--base", "file.pt"),
    "bfloat16 and int8": artifact("share", "made.safetensors", "-o", "shared", "--bf16", "--int8"),
    "one file without a base": artifact("share", "made.safetensors", "-o", "small.safetensors"),
    "no place to share": artifact("share", "made.safetensors"),
}

SAYS = {
    "a pattern that matches nothing": '--include "body*"',
    "a pattern that matches the stem": "--no-skip-stem",
    "everything excluded": "leave --exclude out",
    "too narrow": "--min-channels 0",
    "only the stem": "--no-skip-stem",
    "no convolution": "another model, or --classifier",
    "a subclass that computes the same": "--subclass nets.Same",
    "a subclass that does not": "--no-skip-stem",
    "a subclass that holds more": "--no-skip-stem",
    "a factory that is not there": "nets:tiny",
    "weights of another architecture": "--arch torchvision:shufflenet_v2_x0_5",
    "a folder with a file": "hub/pytorch_model.bin",
}
"""Advice that is derived from the model or the file."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


def test_a_module_that_is_not_on_the_path(here: Path, condconv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "code").mkdir()
    (here / "nets.py").rename(here / "code" / "mynets.py")
    code, _, error = condconv("convert", "mynets:tiny", *OUT)
    assert (code, advice_in(error)) == (2, "PYTHONPATH=FOLDER in front of the command: the folder that holds mynets")
    monkeypatch.syspath_prepend(here / "code")
    assert condconv("convert", "mynets:tiny", *OUT)[0] == 0


def test_a_class_of_ones_own_never_sends_to_a_package_index(
    here: Path, condconv: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "nets.py").rename(here / "requests_of_mine.py")
    torch.save(importlib.import_module("requests_of_mine").tiny(), "file.pt")
    monkeypatch.delitem(sys.modules, "requests_of_mine")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(here)])
    code, _, error = condconv("convert", "file.pt", "--trust", "requests_of_mine", *OUT)
    assert code == 2
    assert advice_in(error) == "PYTHONPATH=FOLDER in front of the command: the folder that holds requests_of_mine"
    assert "pip" not in error


@pytest.mark.parametrize("trust", [[], ["--trust", "__main__"]], ids=str)
def test_a_class_of_a_script_goes_into_a_module(
    trust: list[str], here: Path, condconv: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = importlib.import_module("nets").TwoLayers()
    cls = type("Net", (type(model),), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Net", cls, raising=False)
    model.__class__ = cls
    torch.save(model, "script.pt")
    monkeypatch.delattr(sys.modules["__main__"], "Net")
    code, _, error = condconv("convert", "script.pt", *trust, *OUT)
    assert code == 2
    assert "a class of the script or notebook that saved it" in error
    assert "pip" not in error
    assert advice_in(error).endswith("then that file with --arch nets:Net")
    with (here / "nets.py").open("a") as file:
        file.write("class Net(TwoLayers): pass")
    torch.save(model.state_dict(), "model.pt")
    monkeypatch.delitem(sys.modules, "nets")
    assert condconv("convert", "model.pt", "--arch", "nets:Net", *OUT)[0] == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_code_that_an_error_proposes_runs(here: Path, condconv: Run) -> None:
    model = importlib.import_module("nets").tiny().eval()
    torch.jit.trace(model, torch.zeros(1, 3, 16, 16)).save("script.pt")
    code, _, error = condconv("convert", "script.pt", *OUT)
    assert code == 2
    exec(advice_in(error).partition(" where you trust it")[0], {"torch": torch})
    code, _, error = condconv("convert", "model.pt", "--arch", "nets:tiny", *OUT)
    assert code == 0, error


def test_only_a_classifier_is_sent_to_finetune(here: Path, condconv: Run) -> None:
    assert (
        "Next        condconv finetune out.safetensors --data FOLDER -o RUN --trust nets"
        in condconv("convert", "nets:tiny", *OUT)[2]
    )
    error = condconv("convert", "nets:boxes", *OUT)[2]
    assert "Next        condconv report out.safetensors --trust nets  " in error
    assert "condconv finetune" not in error
    assert condconv("report", "out.safetensors", "--trust", "nets")[0] == 0


def test_a_run_names_a_command_that_works(here: Path, condconv: Run) -> None:
    code, _, said = condconv(*training()())
    assert code == 0, said
    following = said.partition("Next: condconv ")[2].partition("\n")[0]
    assert following == "report run/best.safetensors --data run --trust nets"
    assert condconv(*following.split())[0] == 0


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_advice_helps(mistake: str, here: Path, condconv: Run) -> None:
    require_help(condconv, MISTAKES[mistake](), SAYS.get(mistake, ""))
