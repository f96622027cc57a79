"""Folders and repositories of the Hugging Face Hub: written, read offline from the cache, used as their card says."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.sources import load_model
from condconv_surgery.models.torchvision_source import license_of
from condconv_surgery.recipe import attach_recipe, recipe_of
from tests.conftest import Run

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME = "somebody/mobilenet-condconv"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = load_model("condconv:mobilenet_v1_x0_25", weights="none", num_classes=5, input_size=64)
    return cs.convert(net, cs.CondConv(experts=4)).model.eval()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "shared"
    return cs.save_pretrained(model, path, name=NAME, scores={"top-1 on digits": 0.9123})


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache with the folder as its only repository, and no network."""
    repository = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_folder_is_the_model_again(model: nn.Module, folder: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for loaded in (cs.from_pretrained(folder), load_model(folder), cs.load(folder)):
        assert torch.equal(loaded(x), model(x))


def test_the_config_holds_the_recipe(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    assert data["library_name"] == "condconv-surgery"
    assert data["recipe"]["source"]["name"] == "condconv:mobilenet_v1_x0_25"
    assert data["scores"] == {"top-1 on digits": 0.9123}
    assert data["macs"]["after"] > data["macs"]["before"] > 0
    assert data["license_of_original"] == "mit"


def test_the_card_says_what_it_is(folder: Path, model: nn.Module) -> None:
    card = (folder / "README.md").read_text()
    data = huggingface_hub.ModelCard(card).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("condconv-surgery", "mit", "image-classification")
    for row in (
        "| variant | condconv, 4 experts: 26 layers |",
        "| license of the original | mit |",
        "| top-1 on digits | 0.9123 |",
        "| input | 3x64x64, mean ",
    ):
        assert row in card
    assert re.search(r"\| MACs per image \| [\d.]+ M -> [\d.]+ M \(\+[\d.]+%\) \|", card)
    assert len(re.findall(r"```(?:python|sh)\n", card)) == 3


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (torchvision.models.ResNet18_Weights.DEFAULT, "bsd-3-clause"),
        (torchvision.models.RegNet_Y_128GF_Weights.DEFAULT, "cc-by-nc-4.0"),
    ],
)
def test_published_weights_have_the_license_of_their_project(
    weights: torchvision.models.WeightsEnum, expected: str
) -> None:
    assert license_of(weights) == expected


def test_the_license_of_a_file_is_unknown_whatever_its_architecture(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "mine.pt")
    net = cs.convert(load_model(tmp_path / "mine.pt"), cs.CondConv(experts=2), include=["layer4.1.conv2"]).model
    folder = cs.save_pretrained(net, tmp_path / "shared")
    assert "license: unknown" in (folder / "README.md").read_text()
    recipe = recipe_of(net)
    assert recipe is not None
    attach_recipe(net, replace(recipe, license="bsd-3-clause"))  # as published weights have it
    for model in (net, cs.load(cs.save_pretrained(net, tmp_path / "published"))):
        folder = cs.save_pretrained(model, tmp_path / "again")
        assert "license: bsd-3-clause" in (folder / "README.md").read_text()


def test_the_snippets_of_the_card_run_offline(cache: Path, model: nn.Module, condconv: Run) -> None:
    card = next(cache.rglob("README.md")).read_text()
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(compile(python, "README.md", "exec"), names)
    assert names["output"].shape == (1, 5)
    report, train = (line.split() for line in re.findall(r"```sh\ncondconv (.*?)\n```", card))
    code, out, err = condconv(*report)
    assert code == 0, err
    assert "CondConv" in out or "condconv" in out
    assert train[:2] == ["finetune", f"hf:{NAME}"]
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_model(train[1])(x), model(x))
    assert torch.equal(cs.load(f"hf:{NAME}@main")(x), model(x))


def test_commands_take_a_name_of_the_hub(cache: Path, condconv: Run, tmp_path: Path) -> None:
    code, _, err = condconv("fold", f"hf:{NAME}", "-o", tmp_path / "folded.safetensors")
    assert code == 0, err
    assert (tmp_path / "folded.safetensors").exists()


def test_a_repository_that_is_not_there(cache: Path) -> None:
    with pytest.raises(InputError, match=r"hf:nobody/nothing could not be fetched, and is not in the cache"):
        load_model("hf:nobody/nothing")
    with pytest.raises(InputError, match="could not be fetched"):
        load_model("hf:a/b/c")


def test_a_push_uploads_the_folder(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("login", token))

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            calls.append(("create", name, private, exist_ok))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert cs.push_to_hub(model, NAME, private=True, token="t") == f"https://huggingface.co/{NAME}"
    files = ["README.md", "config.json", "model.safetensors"]
    assert calls == [("login", "t"), ("create", NAME, True, True), ("upload", NAME, files)]


def test_the_command_writes_a_folder_or_a_delta_file(model: nn.Module, tmp_path: Path, condconv: Run) -> None:
    base, artifact = tmp_path / "base.pt", tmp_path / "m.safetensors"
    net = load_model("condconv:mobilenet_v1_x0_25", weights="none", num_classes=5, input_size=64)
    torch.save(net.state_dict(), base)
    trained = cs.convert(net, cs.CondConv(experts=4)).model.eval()
    with torch.no_grad():
        for name, tensor in trained.named_parameters():
            tensor.add_(0.01 * torch.randn_like(tensor) * ("router" not in name))
    cs.save(trained, artifact)
    code, _, err = condconv("share", artifact, "-o", tmp_path / "shared", "--license", "cc0-1.0")
    assert code == 0, err
    assert "license: cc0-1.0" in (tmp_path / "shared" / "README.md").read_text()
    small = tmp_path / "small.safetensors"
    code, out, err = condconv("share", artifact, "--base", base, "--bf16", "-o", small, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["bytes"] == small.stat().st_size < 0.65 * summary["bytes_of_model"]
    assert 0 < summary["weight_error"] < 2**-9 * 0.1
    assert 0 < summary["difference"]["relative"] < 1e-2
    code, _, err = condconv("report", small)
    assert code == 2
    assert f"Try: condconv import {small} --base FILE -o FILE.safetensors" in err
    code, _, err = condconv("import", small, "--base", base, "-o", tmp_path / "again.safetensors")
    assert code == 0, err
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(cs.load(tmp_path / "again.safetensors")(x), cs.load(small, base=base)(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No output was named"),
        (["-o", "x", "--int8", "--base", "b"], "--int8 with --base"),
        (["-o", "x", "--int8", "--bf16"], "--int8 with --bf16"),
        (["-o", "x.safetensors"], "is one file, without --base, --bf16 or --int8"),
        (["-o", "x.safetensors", "--base", "b", "--push", "a/b"], "is one file, with --push a/b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_share_refuses(arguments: list[str], message: str, condconv: Run) -> None:
    code, _, err = condconv("share", "m.safetensors", *arguments)
    assert code == 2
    assert message in err
