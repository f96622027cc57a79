"""From names, files and factories to models; the error for everything else names what it is."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from condconv_surgery.errors import DamagedFileError, InputError, SurgeryError
from condconv_surgery.models.artifact.meta_init import build_on_meta
from condconv_surgery.models.checkpoints.read_checkpoint import read_weights
from condconv_surgery.models.checkpoints.recognise_architecture import recognise
from condconv_surgery.models.checkpoints.state_names import fitting_names
from condconv_surgery.models.checkpoints.weight_sets import AVERAGED
from condconv_surgery.models.sources import SAME_TENSORS, load_model
from condconv_surgery.recipe import Source, recipe_of

SMALL = "torchvision:shufflenet_v2_x0_5"


def small(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(weights=None, **options).eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("wide_resnet50_2", {}),
        ("mobilenet_v2", {"num_classes": 9}),
        ("squeezenet1_1", {"num_classes": 5}),
        ("regnet_y_400mf", {}),
        ("googlenet", {"aux_logits": False}),
        ("densenet121", {"num_classes": 2}),
        ("ssdlite320_mobilenet_v3_large", {}),
    ],
)
def test_an_architecture_is_recognised_by_its_shapes(name: str, options: dict) -> None:
    more = {"init_weights": False} if name == "googlenet" else {}
    more |= {"weights_backbone": None} if name.startswith("ssd") else {}
    model = torchvision.models.get_model(name, weights=None, **options, **more)
    assert recognise(shapes(model)) == Source(f"torchvision:{name}", options)


def test_weights_that_fit_nothing_name_the_nearest() -> None:
    resnet = shapes(torchvision.models.resnet18(weights=None))
    del resnet["layer1.0.conv1.weight"]
    with pytest.raises(InputError, match=r"fit no known architecture(.|\n)*Nearest: torchvision:resnet18"):
        recognise(resnet)


def test_weights_that_fit_several_ask_for_arch() -> None:
    options = {"weights": None, "weights_backbone": None}
    model = torchvision.models.get_model("fasterrcnn_mobilenet_v3_large_fpn", **options)
    with pytest.raises(InputError, match=r"fit several architectures(.|\n)*arch=\"torchvision:fasterrcnn_mobilenet"):
        recognise(shapes(model))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
def test_prefixes_and_nests(tmp_path: Path, prefix: str, nest: str | None) -> None:
    state = small().state_dict()
    content: dict = {prefix + name: tensor for name, tensor in state.items()}
    if nest:
        content = {"epoch": 3, nest: content}
        if nest == "state_dict_ema":
            content["state_dict"] = {name: torch.zeros_like(t) for name, t in state.items()}  # the averaged ones win
    torch.save(content, tmp_path / "m.pt")
    read = fitting_names(read_weights(tmp_path / "m.pt"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


class InModel(nn.Module):
    """All names begin with a prefix that wrappers add, too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_are_tried_as_they_are_before_prefixes_are_removed(tmp_path: Path, prefix: str) -> None:
    original, path, name = InModel(), tmp_path / "m.pt", "tests.models.test_sources:InModel"
    torch.save({f"{prefix}{key}": tensor for key, tensor in original.state_dict().items()}, path)
    for model in (load_model(path, arch=name), load_model(name, weights=path)):
        assert all(torch.equal(tensor, original.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("key", AVERAGED)
def test_averaged_weights_are_taken_and_named(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    state = small().state_dict()
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for content, taken, instead in (
        ({"model": raw, key: state}, key, ", not those under model"),
        (
            {"model": None, key: {"module": state, "n": 7}, "state_dict": raw},
            f"{key}.module",
            ", not those under state_dict",
        ),
        ({"model": state, key: {"decay": 0.99}}, "model", ""),
        ({"model": state, key: None}, "model", ""),
    ):
        caplog.clear()
        torch.save(content, tmp_path / "m.pt")
        read = fitting_names(read_weights(tmp_path / "m.pt"))
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
        expected = f"{tmp_path / 'm.pt'}: took the weights under {taken!r}"
        expected += " (averaged)" if taken.startswith(key) else ""
        assert [record.getMessage() for record in caplog.records] == [expected + instead]


def test_a_counter_alone_is_a_tensor_like_any_other() -> None:
    state = {"n_averaged": torch.tensor(1)}
    assert fitting_names(state) == state


def test_an_averaged_model_is_read_without_its_counter(tmp_path: Path) -> None:
    model = small()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save({"model": None, "model_ema": averaged.state_dict()}, tmp_path / "m.pt")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_model(tmp_path / "m.pt")(x), model(x))


def test_the_nearest_architecture_has_the_most_equal_tensors(tmp_path: Path) -> None:
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    state["features.1.conv.1.weight"] = torch.zeros(17, 32, 1, 1)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(InputError, match="Nearest: torchvision:mobilenet_v2"):
        load_model(tmp_path / "m.pt")


def test_layers_of_a_larger_network_are_not_left_out(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "m.pt")
    with pytest.raises(InputError, match="which the model lacks"):
        load_model(tmp_path / "m.pt", arch="torchvision:resnet18")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_bare_state_dict_becomes_the_model(tmp_path: Path, suffix: str) -> None:
    original, path = small(num_classes=6), tmp_path / f"m.{suffix}"
    if suffix == "pt":
        torch.save(original.state_dict(), path)
    else:
        save_file(original.state_dict(), path)
    for arch in (None, SMALL):
        model = load_model(str(path), arch=arch, num_classes=6 if arch else None)
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(model(x), original(x))
        assert recipe_of(model).source == Source(SMALL, {"num_classes": 6})


def test_a_name_with_weights_from_a_file(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pt")
    model = load_model(SMALL, weights=str(tmp_path / "m.pt"), input_size=96)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), small()(x))
    assert (recipe_of(model).input.height, recipe_of(model).input.width) == (96, 96)


def test_a_users_own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "import torch\ndef tiny(): return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("my_nets:tiny")
    assert recipe_of(model).input.channels == 1
    with pytest.raises(InputError, match="my_nets:nothing cannot be imported"):
        load_model("my_nets:nothing")


def test_timm_by_name() -> None:
    pytest.importorskip("timm")
    model = load_model("timm:mobilenetv3_small_050", weights="none", num_classes=4)
    assert recipe_of(model).source.options == {"num_classes": 4}
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", r"'resnet18' names no library(.|\n)*torchvision:resnet18"),
        ("resnet19", r"Unknown model 'resnet19'(.|\n)*Nearest: resnet1"),
        ("torchvision:resnet19", r"Unknown torchvision model(.|\n)*Nearest: resnet1"),
        ("nowhere/model.pt", "does not exist"),
        (".", "is a folder"),
        ("torchvision:resnet18", "could not be fetched"),
    ],
)
def test_names_that_are_none(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=message):
        load_model(spec)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"do not fit torchvision:resnet18: .*(.|\n)*100 missing, 336 unexpected"):
        load_model(str(tmp_path / "m.pt"), arch="torchvision:resnet18")
    with pytest.raises(InputError, match=r"has shape \(1000, 1024\), the model \(5, 1024\)(.|\n)*num_classes=1000"):
        load_model(str(tmp_path / "m.pt"), arch=SMALL, num_classes=5)


class Options:
    pass


class RunsACommand:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def write(kind: str, path: Path) -> None:
    if kind == "torchscript":
        torch.jit.trace(Tiny(), torch.zeros(1, 1, 2, 2)).save(path)
    elif kind == "pt2":
        torch.export.save(torch.export.export(Tiny(), (torch.zeros(1, 1, 2, 2),)), path)
    elif kind == "module":
        torch.save(Tiny(), path)
    elif kind == "namespace":
        torch.save({"state_dict": small().state_dict(), "args": argparse.Namespace(lr=1)}, path)
    elif kind == "command":
        torch.save({"state_dict": RunsACommand(path.parent / "ran")}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "keras":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.writestr("model.weights.h5", "weights")
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(20_000_000))
    elif kind == "truncated":
        torch.save(small().state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "no weights":
        torch.save({"epoch": 3, "lr": 0.1}, path)
    else:
        path.write_bytes(RAW[kind])


RAW = {
    "empty": b"",
    "text": b"dear diary, today I trained a network\n",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "tensorflow": b"\x08\x01\x12\xbf\x02saved_model" + bytes(50),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(50),
    "onnx": b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:\x00\x00" + bytes(50),
    "safetensors": b"\xff\xff\xff\xff\xff\xff\xff\x7f{",
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}
KINDS = {
    "torchscript": (InputError, "is a TorchScript archive"),
    "pt2": (InputError, r"is an exported program \(.pt2\)"),
    "module": (
        InputError,
        r"is a pickle of more than tensors .* names tests.models.test_sources.Tiny(.|\n)*trust=\[.tests.\]",
    ),
    "namespace": (InputError, r"training state with its options.* names argparse.Namespace(.|\n)*trust=\[.argparse.\]"),
    "command": (InputError, r"names (posix|nt).system: .* holds commands"),
    "zip": (InputError, "a zip archive that is no checkpoint"),
    "bomb": (InputError, "unpacks to far more"),
    "truncated": (DamagedFileError, "cut short"),
    "no weights": (InputError, "holds no weights: keys epoch, lr"),
    "empty": (InputError, "is an empty file"),
    "text": (InputError, "is a text file"),
    "html": (InputError, "an HTML or XML page"),
    "lfs": (InputError, r"a Git LFS pointer(.|\n)*git lfs pull"),
    "hdf5": (InputError, r"an HDF5 file \(Keras\)"),
    "onnx": (InputError, "an ONNX model"),
    "tensorflow": (InputError, "a TensorFlow model"),
    "gzip": (InputError, r"a gzip archive(.|\n)*gunzip"),
    "keras": (InputError, "a Keras model"),
    "safetensors": (DamagedFileError, "cannot be read as safetensors"),
    "pickle": (SurgeryError, "would have to run code|cannot be read"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_state_dict_is_said_to_be_what_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.pt"
    write(kind, path)
    error, message = KINDS[kind]
    with pytest.raises(error, match=message):
        load_model(str(path))
    assert list(tmp_path.iterdir()) == [path]  # nothing ran, nothing was written


@pytest.mark.parametrize("prefix", ["transformers:", ""])
def test_a_folder_of_transformers_asks_for_the_package(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    values = {"architectures": ["ResNetForImageClassification"], "model_type": "resnet"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"not installed(.|\n)*Try: pip install \"condconv-surgery\[transformers\]"):
        load_model(f"{prefix}{tmp_path}")


@pytest.mark.parametrize("arch", [None, "torchvision:resnet18"])
def test_a_network_that_its_tensors_do_not_tell_is_named(
    arch: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """timm's variants with another pooling have the tensors of torchvision's ResNet."""
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "mine.pth")
    model = load_model(tmp_path / "mine.pth", arch=arch)
    assert recipe_of(model).source.name == "torchvision:resnet18"
    said = f"{tmp_path}/mine.pth: taken for torchvision:resnet18; timm:resnetblur18 has the same tensors"
    assert (said in caplog.text) is (arch is None)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_TENSORS)
def test_networks_of_the_same_tensors_are_all_named(name: str) -> None:
    timm = pytest.importorskip("timm")
    own = shapes(torchvision.models.get_model(name.partition(":")[2], weights=None))
    kin = [m for m in timm.list_models() if timm.model_entrypoint(m).__module__ == "timm.models.resnet"]
    found = {f"timm:{m}" for m in kin if shapes(build_on_meta(Source(f"timm:{m}"))) == own}
    assert found - {name.replace("torchvision", "timm")} == set(re.findall(r"timm:\w+", SAME_TENSORS[name]))
