"""Whole pickled modules: read when every name in them is allowed, the same network afterwards and after saving."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.checkpoints.allowlist import HELPER_MODULES, LAYER_MODULES, name_of, resolve, trusted
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import CondConv, Source, recipe_of
from tests.small_networks import SmallNet, small_net

TORCHVISION = ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0", "regnet_y_400mf"]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_torchvision_module_is_read_and_its_source_known(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    torch.save(original, tmp_path / "m.pt")
    model = load_model(str(tmp_path / "m.pt"))
    assert torch.equal(model(X), original(X))
    assert recipe_of(model).source == Source(f"torchvision:{name}", {"num_classes": 5})


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "convnext_atto", pytest.param("dm_nfnet_f0", marks=pytest.mark.slow)]
)
def test_a_timm_module_is_read(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    original = timm.create_model(name, num_classes=3).eval()
    torch.save(original, tmp_path / "m.pt")
    model = load_model(str(tmp_path / "m.pt"))
    assert torch.equal(model(X), original(X))
    cs.save(model, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(X), original(X))


def test_a_changed_module_keeps_its_change_through_conversion_and_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    original.conv5[2] = nn.Hardswish()  # type: ignore[index]
    torch.save({"epoch": 3, "model": nn.DataParallel(original)}, tmp_path / "m.pt")
    model = load_model(str(tmp_path / "m.pt"))
    assert torch.equal(model(X), original(X))
    assert recipe_of(model).source == Source()
    converted = cs.convert(model, CondConv(experts=2), example=X).model.eval()
    cs.save(converted, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(X), converted(X))


def test_a_module_of_ones_own_needs_its_package_named(tmp_path: Path) -> None:
    original = small_net().eval()
    path = tmp_path / "m.pt"
    torch.save(original, path)
    with pytest.raises(InputError, match=r"names tests.small_networks.SmallNet(.|\n)*trust=\[.tests.\]"):
        load_model(str(path))
    model = load_model(str(path), trust=("tests",))
    assert type(model) is SmallNet
    assert torch.equal(model(X), original(X))
    cs.save(model, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"trust=\[.tests.\]"):
        load_model(str(tmp_path / "m.safetensors"))
    assert torch.equal(load_model(str(tmp_path / "m.safetensors"), trust=("tests",))(X), original(X))


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_pickle_protocol_3_is_read_and_a_newer_one_is_named(whole: bool, as_zip: bool, tmp_path: Path) -> None:
    original = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=4).eval()
    path, content = tmp_path / "m.pt", original if whole else original.state_dict()

    def save(protocol: int) -> None:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)

    if as_zip or not whole:  # a whole module from before torch 1.6 lists no names
        for protocol in (2, 3):
            save(protocol)
            assert torch.equal(load_model(str(path))(X), original(X))
    for protocol in (4, 5):
        save(protocol)
        with pytest.raises(InputError, match=rf"with pickle protocol {protocol}\.[\s\S]*up to 3[\s\S]*state_dict"):
            load_model(str(path))


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_state_that_pickle_itself_wrote_is_named(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(nn.Linear(2, 2).state_dict(), protocol))
    with pytest.raises(InputError, match=rf"m.pkl was written with pickle protocol {protocol}\."):
        load_model(str(tmp_path / "m.pkl"))


def test_a_damaged_file_gives_torchs_reason_and_not_its_advice(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02" + pickle.FRAME + b"x" * 100)
    with pytest.raises(DamagedFileError, match="cannot be read: Unsupported operand 149") as caught:
        load_model(str(path))
    assert "weights_only" not in str(caught.value)


def test_a_training_state_with_its_options(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=4).eval()
    torch.save({"state_dict": original.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "m.pt")
    model = load_model(str(tmp_path / "m.pt"), trust=("argparse",))
    assert torch.equal(model(X), original(X))


@pytest.mark.parametrize("package", ["os", "builtins", "subprocess", "torch", "importlib", "timm", "functools"])
def test_what_holds_commands_cannot_be_trusted(package: str) -> None:
    with pytest.raises(InputError, match=rf"trust=\[.{package}.\] would let a file run anything"):
        trusted((package,))


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.modules.module.Tensor",  # passing through, from another place
        "torch.nn.functional.torch",
        "torch.nn.init.normal_",
        "torchvision.models.resnet.load_state_dict_from_url",
        "torchvision.models._api.get_model",
        "torchvision.datasets.mnist.MNIST",
        "timm.models._factory.create_model",
        "timm.task.distillation.DistillationTeacher",
        "timm.utils.checkpoint_saver.CheckpointSaver",
        "collections.namedtuple",
        "functools.reduce",
    ],
)
def test_names_that_could_do_more_than_build_layers(name: str) -> None:
    with pytest.raises(InputError, match="The file names"):
        resolve(name)


def test_trusting_a_package_is_not_trusting_what_it_imports() -> None:
    with pytest.raises(InputError, match="only imports it from elsewhere"):
        resolve("tests.hostile_files.Path", ("tests",))
    assert name_of(SmallNet) == "tests.small_networks.SmallNet"
    assert name_of(lambda: None) is None


def test_no_allowed_constructor_reads_writes_fetches_or_runs() -> None:
    """Over the sources of every allowed module: fails when a new release adds such a class."""
    forbidden = {
        *("open", "eval", "exec", "compile", "__import__", "import_module", "system", "Popen", "urlopen", "download"),
        *("load_state_dict_from_url", "load_checkpoint", "load_pretrained", "create_model", "unlink", "rmtree"),
    }
    found = [
        f"{path.name}: {node.name}.{method.name} calls {name}"
        for path in allowed_sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__new__", "__setstate__")
        for name in called(method) & forbidden
    ]
    assert found == []


def allowed_sources() -> list[Path]:
    paths: set[Path] = set()
    for parent in {*LAYER_MODULES, *HELPER_MODULES}:
        if parent.startswith("timm"):
            pytest.importorskip("timm")
        spec = importlib.util.find_spec(parent)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        paths.update(origin.parent.rglob("*.py") if spec.submodule_search_locations else [origin])
    return sorted(paths)


def called(method: ast.FunctionDef) -> set[str]:
    calls = [node.func for node in ast.walk(method) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}
