"""ODConv checkpoints in the authors' layout, against their layer written down again from their paper and names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers, set_temperature
from condconv_surgery.models.layouts.layout_registry import write_layout
from condconv_surgery.models.layouts.odconv_layout import to_odconv_layout
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import CondConv, ODConv, Source, recipe_of
from tests.variant_cases import scramble

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BLOCKS = ["layer*.conv*"]


class TheirAttention(nn.Module):
    def __init__(self, inner: int, outer: int, kernel: int, groups: int, experts: int, reduction: float) -> None:
        super().__init__()
        hidden = max(int(inner * reduction), 16)
        self.fc = nn.Conv2d(inner, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.channel_fc = nn.Conv2d(hidden, inner, 1)
        if not inner == groups == outer:
            self.filter_fc = nn.Conv2d(hidden, outer, 1)
        if kernel > 1:
            self.spatial_fc = nn.Conv2d(hidden, kernel * kernel, 1)
        if experts > 1:
            self.kernel_fc = nn.Conv2d(hidden, experts, 1)


class TheirConv(nn.Module):
    """One sample at a time: the kernel of the paper's equation, plain sigmoids."""

    def __init__(self, plain: nn.Conv2d, experts: int, reduction: float = 0.0625) -> None:
        super().__init__()
        self.plain = [plain]  # in a list: not a child
        inner, outer, kernel = plain.in_channels, plain.out_channels, plain.kernel_size[0]
        self.weight = nn.Parameter(torch.randn(experts, *plain.weight.shape) * plain.weight.std())
        self.attention = TheirAttention(inner, outer, kernel, plain.groups, experts, reduction)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x[i : i + 1]) for i in range(len(x))])

    def one(self, x: Tensor) -> Tensor:
        a, plain = self.attention, self.plain[0]
        h = torch.relu(a.bn(a.fc(x.mean((2, 3), keepdim=True))))
        weight = self.weight
        if hasattr(a, "kernel_fc"):
            weight = weight * torch.softmax(a.kernel_fc(h), 1).view(-1, 1, 1, 1, 1)
        if hasattr(a, "spatial_fc"):
            weight = weight * torch.sigmoid(a.spatial_fc(h)).view(1, 1, 1, *plain.kernel_size)
        x = x * torch.sigmoid(a.channel_fc(h))
        y = F.conv2d(x, weight.sum(0), None, plain.stride, plain.padding, plain.dilation, plain.groups)
        return y * torch.sigmoid(a.filter_fc(h)) if hasattr(a, "filter_fc") else y


def theirs(name: str, experts: int, reduction: float = 0.0625) -> nn.Module:
    """The published architecture: every convolution but the stem (and ResNet's downsample)."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    for layer, module in convolutions[1:]:
        model.set_submodule(layer, TheirConv(module, experts, reduction))
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "experts", "reduction"),
    [("resnet18", 1, 0.0625), ("resnet18", 4, 0.0625), ("mobilenet_v2", 2, 0.0625), ("mobilenet_v2", 1, 0.1)],
)
def test_their_checkpoint_becomes_our_model(name: str, experts: int, reduction: float, tmp_path: Path) -> None:
    original = theirs(name, experts, reduction)
    state = {f"module.{key}": tensor for key, tensor in original.state_dict().items()}
    torch.save({"epoch": 100, "state_dict": state}, tmp_path / "checkpoint.pth.tar")
    model = load_model(str(tmp_path / "checkpoint.pth.tar"))
    torch.testing.assert_close(model(X), original(X), rtol=1e-4, atol=1e-4)
    assert recipe_of(model).source == Source(f"torchvision:{name}", {"num_classes": 10})
    assert {layer.variant.experts for layer in conditional_layers(model).values()} == {experts}
    cs.save(model, tmp_path / "ours.safetensors")
    assert torch.equal(cs.load(tmp_path / "ours.safetensors")(X), model(X))
    back = to_odconv_layout(model)
    assert back.keys() == original.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in original.state_dict().items())  # to the last bit


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_our_model_loads_into_their_code(temperature: float) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None, num_classes=10)
    model = cs.convert(plain, ODConv(experts=3), example=X, include=BLOCKS).model.eval()
    scramble(model)
    set_temperature(model, temperature)
    other = theirs("resnet18", 3)
    other.load_state_dict(to_odconv_layout(model), strict=True)
    ours, other, x = model.double(), other.double(), X.double()  # these random routers amplify rounding a millionfold
    torch.testing.assert_close(other(x), ours(x), rtol=1e-6, atol=1e-6)


def test_what_their_layer_cannot_hold() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=True))
    with pytest.raises(InputError, match=r"^1 has a bias(.|\n)*no bias"):
        to_odconv_layout(cs.convert(plain, ODConv(experts=2), example=X).model)
    with pytest.raises(InputError, match=r"^1 is a CondConv2d"):
        to_odconv_layout(cs.convert(plain, CondConv(experts=2), example=X).model)
    plain[1] = nn.Conv2d(4, 4, 3, bias=False)
    with pytest.raises(InputError, match=r"^1 has no attention over kernel positions"):
        to_odconv_layout(cs.convert(plain, ODConv(experts=1, spatial=False), example=X).model)
    plain[1] = nn.Conv2d(4, 4, 1, bias=False)  # theirs has none over 1x1 kernels either
    assert to_odconv_layout(cs.convert(plain, ODConv(experts=1, spatial=False), example=X).model)


def test_a_model_on_meta_has_nothing_to_write(tmp_path: Path) -> None:
    with torch.device("meta"):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False))
    model = cs.convert(plain, ODConv(experts=2), example=X, prove=False).model
    for write in (lambda path: write_layout(model, "odconv", path), lambda path: cs.save(model, path)):
        with pytest.raises(InputError, match=r"0.weight is on the meta device[\s\S]*load the weights"):
            write(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_layers_in_other_places(tmp_path: Path) -> None:
    torch.save(theirs("resnet18", 1).state_dict(), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"has ODConv layers that the model has not"):
        load_model(str(tmp_path / "m.pt"), arch="torchvision:mobilenet_v2", num_classes=10)


def test_a_shared_layer_goes_out_under_each_of_its_names() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, bias=False)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(self.stem(x)))

    state = to_odconv_layout(cs.convert(Shared(), ODConv(2), example=X).model)
    own = {name.removeprefix("one."): tensor for name, tensor in state.items() if name.startswith("one.")}
    other = {name.removeprefix("other."): tensor for name, tensor in state.items() if name.startswith("other.")}
    assert "attention.fc.weight" in own
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
