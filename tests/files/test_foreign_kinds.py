"""Files of other kinds and of other frameworks: each is named, and what is advised works."""

from __future__ import annotations

import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.models.sources import load_model

ARCH = "tests.files.test_foreign_kinds:net"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()


def refused(path: str, what: str) -> str:
    """The advice for a file or folder that is said to be ``what``."""
    with pytest.raises(InputError) as error:
        load_model(path, arch=ARCH)
    assert error.value.given == f"{path} is {what}."
    assert error.value.allowed
    return error.value.fix


def loads(path: str) -> bool:
    state = load_model(path, arch=ARCH).state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in net().state_dict().items())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


TABLE = bytes(range(50)) + bytes.fromhex("57fb808b247547db")
"""The end of a table of TensorFlow."""

BYTES = {
    "model.mlmodel": (b"\x08\x04\x12\xa6\x01" + bytes(50), "a Core ML model"),
    "model.tflite": (b"\x1c\0\0\0TFL3" + bytes(50), "a TensorFlow model"),
    "renamed.pt": (b"\x1c\0\0\0TFL3" + bytes(50), "a TensorFlow model"),
    "frozen.pb": (b"\x0a\x2e\x0a\x05input" + bytes(50), "a TensorFlow model"),
    "model.engine": (b"ftrt" + bytes(50), "a TensorRT engine"),
    "model.pte": (b"\x1c\0\0\0ET12" + bytes(50), "an ExecuTorch program"),
    "model.gguf": (b"GGUF\x03" + bytes(50), "a GGUF file"),
    "model.param": (b"7767517\n3 3\n", "an ncnn model"),
    "yolo.weights": (b"\0\0\0\0\2\0\0\0" + b"\x11" * 50, "a Darknet model"),
    "net.caffemodel": (b"\x0a\x06ResNet" + bytes(50), "a Caffe model"),
    "net.pdparams": (b"}q\0." + bytes(50), "a PaddlePaddle model"),
    "net.mat": (b"MATLAB 5.0 MAT-file" + bytes(50), "a MATLAB file"),
    "model.xml": (b'<?xml version="1.0"?>\n<net name="x" version="11">', "an OpenVINO model"),
    "model.ckpt-7.index": (b"\0\0\5\x08\1" + TABLE, "a TensorFlow checkpoint"),
    "model.ckpt-7.meta": (b"\x0a\x2e\x0a\x05input" + bytes(50), "a TensorFlow checkpoint"),
    "model.ckpt-7.data-00000-of-00001": (b"\x11" * 50, "a TensorFlow checkpoint"),
    "checkpoint": (b'model_checkpoint_path: "model.ckpt-7"\n', "a TensorFlow checkpoint"),
    "of_tensorflow_1.ckpt": (b"\0\0\5\x08\1" + TABLE, "a TensorFlow checkpoint"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file (Keras)"),
    "archive.pt": (b"\xfd7zXZ\0" + bytes(50), "an xz archive"),
    "zeros.pt": (bytes(5000), "a file of zeros"),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_file_of_another_framework_is_named(name: str) -> None:
    content, what = BYTES[name]
    Path(name).write_bytes(content)
    assert refused(name, what)


def test_the_end_of_a_name_does_not_hide_a_torch_file() -> None:
    for name in ("darknet53.weights", "net.mat", "net.pdparams"):
        torch.save(net().state_dict(), name)
        assert loads(name)


def test_folders_of_one_model() -> None:
    for folder, file, what in (
        ("tf", "saved_model.pb", "a TensorFlow model"),
        ("a.mlpackage", "Manifest.json", "a Core ML model"),
    ):
        Path(folder).mkdir()
        Path(folder, file).touch()
        assert refused(folder, what)


def test_a_checkpoint_of_tensorflow_by_the_name_of_its_files_together() -> None:
    Path("run").mkdir()
    for name in ("model.ckpt-7.index", "model.ckpt-7.data-00000-of-00001", "checkpoint"):
        Path("run", name).write_bytes(BYTES[name][0])
    for path in ("run", "run/model.ckpt-7"):
        assert refused(path, "a TensorFlow checkpoint") == (
            "the PyTorch version of the model, a name in timm.list_models('*tf_*')"
        )
    assert "tf_efficientnet_b0" in timm.list_models("*tf_*")
    torch.save(net().state_dict(), "run/model.pt")
    with pytest.raises(InputError) as error:
        load_model("run", arch=ARCH)
    assert loads(error.value.fix)


@pytest.mark.parametrize("beside", [".xml", ".param"])
def test_weights_beside_the_model_of_a_runtime(beside: str) -> None:
    Path("model.bin").write_bytes(b"\x3f" * 50)
    Path(f"model{beside}").write_text("<net ")
    what = {".xml": "the weights of an OpenVINO model", ".param": "the weights of an ncnn model"}[beside]
    assert refused("model.bin", what) == "the PyTorch model it was exported from"
    torch.save(net().state_dict(), "model.bin")
    assert loads("model.bin")


def test_a_tar_archive() -> None:
    torch.save(net().state_dict(), "inside.pth")
    with tarfile.open("model.pth.tar", "w") as archive:
        archive.add("inside.pth")
    Path("inside.pth").unlink()
    assert refused("model.pth.tar", "a tar archive") == "tar xf model.pth.tar, then the checkpoint inside"
    with tarfile.open("model.pth.tar") as archive:
        archive.extractall(".", filter="data")
    assert loads("inside.pth")


def test_arrays_of_numpy() -> None:
    np.savez("model.npz", **{name: tensor.numpy() for name, tensor in net().state_dict().items()})
    exec(refused("model.npz", "NumPy arrays (.npz)"), {"torch": torch, "numpy": np})
    assert loads("model.pt")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10 reads its archives so
def test_an_exported_program() -> None:
    with torch.no_grad():
        torch.export.save(torch.export.export(net(), (torch.zeros(1, 3, 8, 8),)), "model.pt2")
    advice = refused("model.pt2", "an exported program (.pt2)")
    exec(advice.removesuffix(" where you trust it"), {"torch": torch})
    assert loads("model.pt")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
def test_a_distributed_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed_checkpoint.save({"model": net().state_dict()}, checkpoint_id="run", no_dist=True)
    advice = refused("run", "a folder of torch.distributed.checkpoint")
    command = advice.removesuffix(", then model.pt").split()
    assert command[:2] == ["python", "-m"]
    monkeypatch.setattr(sys, "argv", command[2:])
    runpy.run_module(command[2], run_name="__main__")
    assert loads("model.pt")


def test_a_python_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("nets19.py").write_text("from torch import nn\ndef tiny(): return nn.Conv2d(3, 8, 3)\n")
    advice = refused("nets19.py", "a Python file")
    monkeypatch.syspath_prepend(".")
    assert isinstance(load_model(advice.replace("FUNCTION", "tiny")), nn.Conv2d)


@pytest.mark.parametrize("content", [None, 3, "text", torch.zeros(3), [torch.zeros(3)], {}, {"state_dict": {}}])
def test_what_holds_no_weights(content: object) -> None:
    torch.save(content, "model.pt")
    with pytest.raises(InputError, match=r"model\.pt holds no weights: (a|an|keys) .*"):
        load_model("model.pt", arch=ARCH)


def quantisable() -> nn.Module:
    model = nn.Sequential(QuantStub(), *net(), DeQuantStub())
    model.qconfig = get_default_qconfig("fbgemm")  # type: ignore[assignment]
    return model.eval()


def observed() -> nn.Module:
    model = prepare(quantisable())
    model(torch.randn(2, 3, 8, 8))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_pickled_network_of_torch_ao() -> None:
    torch.backends.quantized.engine = "fbgemm"
    torch.save(convert(observed()), "quantised.pt")
    model = observed()
    state = {name.replace("1.", "0.", 1).replace("2.", "1.", 1): t for name, t in model.state_dict().items()}
    for module in model.modules():
        module.__dict__.pop("qconfig", None)  # one of torch's own functions in it cannot be pickled
    torch.save(model, "observed.pt")
    with pytest.raises(
        InputError, match=r"a pickle of a quantised network: it names torch\.ao\.nn\.quantized"
    ) as error:
        load_model("quantised.pt", arch=ARCH)
    assert error.value.fix.endswith("with the model before it was quantised")
    with pytest.raises(InputError, match=r"prepared for quantisation: it names torch\.ao\.quantization") as error:
        load_model("observed.pt", arch=ARCH)
    exec(error.value.fix.partition(" where the model was made")[0], {"torch": torch, "model": model})
    torch.save(state, "model.pt")
    assert loads("model.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pickled_network_with_the_hooks_of_spectral_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.utils.spectral_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)).eval()
    torch.save(model, "whole.pt")
    x = torch.randn(2, 3, 16, 16)
    whole = load_model("whole.pt")
    assert torch.equal(whole(x), model(x))
    conversion = cs.convert(whole, cs.CondConv(experts=2), example=x)
    assert "remove_spectral_norm" in conversion.plan.skipped[-1].reason
    assert list(conditional_layers(conversion.model)) == ["2"]
