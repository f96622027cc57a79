"""State dicts whose tensors are not the weights as the model has them: parts of weights, other dtypes and layouts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.parametrize as parametrize
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.sources import load_model

ARCH = "tests.files.test_kinds_of_tensors:Net"
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
State = dict[str, torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.stem(x).relu()).mean((2, 3)))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.body)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def small() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(weights=None).eval()


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)


def weight_norm(layer: nn.Module, dim: int | None = 0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, dim=dim)


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "pruning masks": pruned,
    "weight_norm": weight_norm,
    "weight_norm over all": lambda layer: weight_norm(layer, None),
    "weight_norm of inputs": lambda layer: weight_norm(layer, 1),
    "weight_norm, parametrized": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm of inputs": lambda layer: nn.utils.spectral_norm(layer, dim=1),
    "spectral_norm, parametrized": parametrizations.spectral_norm,
}


def stretched(model: Net) -> Net:
    """As after training: the norms are no longer those of the initial weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_is_computed_from_its_parts(
    kind: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    for layer in (model.stem, model.body):
        COMPUTED[kind](layer)
    stretched(model).train()
    for _ in range(3):  # power iterations
        model(X)
    model.eval()
    torch.save({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "m.pt")
    for read in (load_model(tmp_path / "m.pt", arch=ARCH), load_model(ARCH, weights=tmp_path / "m.pt")):
        assert read.state_dict().keys() == net().state_dict().keys()
        torch.testing.assert_close(read(X), model(X), atol=1e-6, rtol=0)
    count = 4 if kind == "pruning masks" else 2
    assert f"m.pt: applied {kind.split()[0].removesuffix(',')}" in caplog.text
    assert f" to {count} tensors, which are plain ones from here on" in caplog.text


def test_the_architecture_of_a_pruned_network_is_recognised(tmp_path: Path) -> None:
    model = small()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", 0.3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.pt")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_model(tmp_path / "m.pt")(x), model(x))


def test_a_network_that_has_the_parts_keeps_them(tmp_path: Path) -> None:
    torch.save(Normed().state_dict(), tmp_path / "m.pt")
    read = load_model(tmp_path / "m.pt", arch="tests.files.test_kinds_of_tensors:Normed")
    assert "body.parametrizations.weight.original0" in read.state_dict()


def test_names_that_end_alike_are_no_parts(tmp_path: Path) -> None:
    state = {**net().state_dict(), "fc.scale_g": torch.ones(3), "fc.scale_v": torch.ones(5, 2)}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"it has 'fc\.scale_g', which the model lacks"):
        load_model(tmp_path / "m.pt", arch=ARCH)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("arch", [None, ARCH])
@pytest.mark.parametrize("kind", ["a function of yours", "orthogonal"])
def test_a_parametrization_by_code_is_to_be_removed(
    kind: str, arch: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = net()
    if kind == "orthogonal":
        parametrizations.orthogonal(model.body)
    else:
        parametrize.register_parametrization(model.body, "weight", Doubled())
    torch.save(model.state_dict(), "file.pt")
    with pytest.raises(InputError, match="a parametrization computes the weight of body") as error:
        load_model("file.pt", arch=arch)
    first, _, last = error.value.fix.partition(" for each such module where the model was made, then ")
    expected = model(X)
    exec(f"{first}; {last}", {"torch": torch, "module": model.body, "model": model})
    torch.testing.assert_close(load_model("model.pt", arch=ARCH)(X), expected)


def test_observers_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    observers = {
        "activation_post_process_0.eps": torch.ones(1),
        "body.activation_post_process.min_val": torch.ones(1),
        "body.weight_fake_quant.scale": torch.ones(8),
    }
    torch.save({**net().state_dict(), **observers}, tmp_path / "m.pt")
    assert torch.equal(load_model(tmp_path / "m.pt", arch=ARCH)(X), net()(X))
    assert "left out 3 tensors of observers of torch.ao" in caplog.text


def per_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.01, 0, torch.qint8)


QUANTISED: dict[str, Callable[[State], dict[str, object]]] = {
    "layers of torch.ao": lambda s: {
        "stem.weight": per_tensor(s["stem.weight"]),
        "stem.scale": torch.tensor(0.1),
        "fc._packed_params.dtype": torch.qint8,
        "fc._packed_params._packed_params": (per_tensor(s["fc.weight"]), s["fc.bias"]),
    },
    "linear layers alone": lambda s: {
        **{name: tensor for name, tensor in s.items() if not name.startswith("fc.")},
        "fc.scale": torch.tensor(1.0),
        "fc._packed_params._packed_params": (per_tensor(s["fc.weight"]), s["fc.bias"]),
    },
    "under plain names": lambda s: {n: per_tensor(t) if t.dim() == 4 else t for n, t in s.items()},
    "bytes and scales": lambda s: {
        **{n: t.to(torch.int8) if t.dim() == 4 else t for n, t in s.items()},
        **{f"{n}_scale": torch.ones(len(t)) for n, t in s.items() if t.dim() == 4},
    },
    "bytes": lambda s: {n: t.to(torch.int8) if t.dim() == 4 else t for n, t in s.items()},
    "float8": lambda s: {n: t.to(torch.float8_e4m3fn) if t.dim() == 4 else t for n, t in s.items()},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of quantised tensors
@pytest.mark.parametrize("arch", [None, ARCH])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_network_is_named_as_such(kind: str, arch: str | None, tmp_path: Path) -> None:
    torch.save(QUANTISED[kind](net().state_dict()), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"holds a quantised network: .* is q?(u?int8|float8_e4m3fn)") as error:
        load_model(tmp_path / "m.pt", arch=arch)
    assert "with the model before it was quantised" in error.value.fix


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool], ids=str)
def test_other_dtypes_are_not_cut_to_real_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) if tensor.dim() > 1 else tensor for name, tensor in net().state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    name = str(dtype).removeprefix("torch.")
    for load in (lambda path: load_model(path, arch=ARCH), lambda path: load_model(ARCH, weights=path)):
        with pytest.raises(InputError, match=rf"m\.pt: stem\.weight is {name}, where the model has float32"):
            load(tmp_path / "m.pt")


def test_tensors_without_values(tmp_path: Path) -> None:
    torch.save({name: tensor.to("meta") for name, tensor in net().state_dict().items()}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"stem\.weight is on the meta device: it has no values"):
        load_model(tmp_path / "m.pt", arch=ARCH)


def one_storage(state: State) -> State:
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    views = flat.split([tensor.numel() for tensor in state.values()])
    return {name: view.view(state[name].shape) for name, view in zip(state, views, strict=True)}


def of_kernels(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: {name: change(tensor) if tensor.dim() == 4 else tensor for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State], State]] = {
    "views of one storage": one_storage,
    "transposed": lambda s: {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in s.items()},
    "conjugate and negative": of_kernels(lambda t: torch.complex(t, -t).conj().imag),
    "sparse": of_kernels(torch.Tensor.to_sparse),
    "compressed": lambda s: {n: t.to_sparse_csr() if t.dim() == 2 else t for n, t in s.items()},
    "parameters": lambda s: {n: nn.Parameter(t) for n, t in s.items()},
    "channels last": of_kernels(lambda t: t.to(memory_format=torch.channels_last)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_values_are_those_of_the_file_whatever_its_layout(kind: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[kind](dict(net().state_dict())), tmp_path / "m.pt")
    read = load_model(tmp_path / "m.pt", arch=ARCH)
    assert all(torch.equal(tensor, net().state_dict()[name]) for name, tensor in read.state_dict().items())
    cs.save(read, tmp_path / "m.safetensors")


def test_metadata_of_safetensors_does_not_matter(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "m.safetensors", {"format": "pt", "author": "x"})
    assert torch.equal(load_model(tmp_path / "m.safetensors", arch=ARCH)(X), net()(X))
