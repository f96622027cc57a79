"""timm's EfficientNets with CondConv, in and out, against timm itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers, routed_blocks
from condconv_surgery.models.layouts.layout_registry import write_layout
from condconv_surgery.models.layouts.odconv_layout import to_odconv_layout
from condconv_surgery.models.layouts.timm_layout import condconv_names, from_timm_layout, to_timm_layout
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, recipe_of
from tests.variant_cases import scramble

timm = pytest.importorskip("timm")

PUBLISHED = [
    pytest.param("tf_efficientnet_cc_b0_4e", "tf_efficientnet_b0", 4, 13_314_116),
    pytest.param("tf_efficientnet_cc_b0_8e", "tf_efficientnet_b0", 8, 24_013_284, marks=pytest.mark.slow),
    pytest.param("tf_efficientnet_cc_b1_8e", "tf_efficientnet_b1", 8, 39_715_968, marks=pytest.mark.slow),
]
X = torch.randn(3, 3, 96, 89, generator=torch.Generator().manual_seed(0))
CLI = Callable[..., tuple[int, str, str]]


@torch.no_grad()
def theirs(name: str, **options: int) -> nn.Module:
    """timm's network, random, with the statistics of a batch in its norms, so that its outputs are of order 1."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    nn.init.normal_(model.classifier.weight)
    model.train()(torch.randn(16, 3, 96, 96))
    return model.eval()


def converted(plain: str, experts: int, include: str = "blocks.[456].*", **options: float) -> nn.Module:
    model = timm.create_model(plain, **options).eval()
    layers = {"include": [include], "exclude": ["*.se.*"]}
    return cs.convert(model, CondConv(experts, routing="block"), example=X, prove=False, **layers).model.eval()


@torch.no_grad()
def assert_same(ours: nn.Module, other: nn.Module) -> None:
    """Outputs to 1e-5 of the largest, for a batch and for one image."""
    dtype = next(other.parameters()).dtype
    for x in (X.to(dtype), X[:1].to(dtype)):
        expected = other(x)
        assert expected.abs().max() > 1
        assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "plain", "experts", "parameters"), PUBLISHED)
def test_a_converted_network_is_timms_own(name: str, plain: str, experts: int, parameters: int) -> None:
    ours, other = converted(plain, experts), theirs(name)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in other.parameters()) == parameters
    ours.load_state_dict(from_timm_layout(ours, other.state_dict()))
    assert_same(ours, other)
    other.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in other.state_dict().items()})
    scramble(ours.double())  # such routers multiply rounding errors a hundred thousand times
    other.double().load_state_dict(to_timm_layout(ours))
    assert_same(ours, other)


def test_their_file_becomes_an_artifact_and_their_file_again(condconv: CLI, tmp_path: Path) -> None:
    other = theirs("tf_efficientnet_cc_b0_4e", num_classes=7)
    checkpoint, artifact, back = tmp_path / "cc.pth", tmp_path / "cc.safetensors", tmp_path / "back.safetensors"
    torch.save({"state_dict": other.state_dict()}, checkpoint)
    code, out, err = condconv("import", checkpoint, "-o", artifact, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["source"], summary["layers"], summary["routers"]) == ("timm:tf_efficientnet_b0", 24, 8)
    assert summary["parameters"] == sum(p.numel() for p in other.parameters())
    ours = cs.load(artifact)
    assert_same(ours, other)
    recipe = recipe_of(ours)
    assert recipe is not None
    assert recipe.input.mean == (0.5, 0.5, 0.5)  # of the network with CondConv; the plain one has ImageNet's
    code, out, err = condconv("export", artifact, "--layout", "timm", "-o", back)
    assert (code, out) == (0, ""), err
    read = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=7, checkpoint_path=str(back)).eval()
    assert_same(ours, read)
    for key, tensor in other.state_dict().items():  # 2/4 is a power of two: not a bit is lost
        assert torch.equal(load_file(back)[key], tensor), key


def test_the_architecture_may_be_named_by_either_name(tmp_path: Path) -> None:
    other = theirs("tf_efficientnet_cc_b0_4e")
    torch.save(other.state_dict(), tmp_path / "cc.pth")
    for name in ("tf_efficientnet_cc_b0_4e", "tf_efficientnet_b0"):
        ours = load_model(str(tmp_path / "cc.pth"), arch=f"timm:{name}")
        assert_same(ours, other)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("timm:resnet18", {}, r"router of CondConv for blocks\.4\.0, where the model does not fit"),
        ("timm:tf_efficientnet_b1", {}, "do not fit timm:tf_efficientnet_b1"),
        (None, {"blocks.4.0.conv_pw.weight": torch.zeros(4, 5)}, r"fit no known architecture"),
        (
            "timm:tf_efficientnet_b0",
            {"blocks.4.0.conv_pw.weight": torch.zeros(4, 5)},
            r"conv_pw needs a weight of \(4, 38400\), the file's is \(4, 5\)",
        ),
        (
            "timm:tf_efficientnet_b0",
            {"blocks.4.0.routing_fn.weight": torch.zeros(4, 7)},
            r"its input has 80 channels, the file's router takes 7",
        ),
        (
            "timm:tf_efficientnet_b0",
            {"blocks.4.0.routing_fn.bias": torch.zeros(5)},
            r"a router has a weight \[experts, channels\] and a bias \[experts\]",
        ),
    ],
)
def test_the_error_for_a_file_that_does_not_fit(
    tmp_path: Path, arch: str | None, change: dict[str, Tensor], message: str
) -> None:
    state = timm.create_model("tf_efficientnet_cc_b0_4e").state_dict()
    torch.save({**state, **change}, tmp_path / "cc.pth")
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "cc.pth"), arch=arch)


@pytest.mark.parametrize(
    ("variant", "layers", "message"),
    [
        (CondConv(2), ["blocks.6.*"], r"blocks\.6\.0\.conv_pw has a router of its own"),
        (CondConv(2, routing="block"), ["blocks.6.0.conv_[pd]w"], r"blocks\.6\.0\.conv_pwl is not converted"),
        (DynamicConv(2, routing="block"), ["blocks.6.*"], r"blocks\.6\.0 is not converted to condconv"),
    ],
)
def test_the_error_for_what_timm_cannot_hold(variant: CondConv, layers: list[str], message: str) -> None:
    model = timm.create_model("tf_efficientnet_b0")
    made = cs.convert(model, variant, example=X, include=layers, exclude=["*.se.*"], prove=False).model
    with pytest.raises(InputError, match=message):
        to_timm_layout(made)


def test_the_error_for_a_block_of_another_class() -> None:
    made = cs.convert(
        timm.create_model("resnet18"), CondConv(2, routing="block"), example=X, include=["layer4.*"], prove=False
    ).model
    assert routed_blocks(made)
    with pytest.raises(InputError, match=r"layer4\.0 is a BasicBlock"):
        to_timm_layout(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"blocks\.5\.0 has a norm with eps=1e-05"),
        ({"bn_eps": 1e-3}, r"blocks\.5\.0 pads by \(2, 2\)"),
    ],
)
def test_the_error_for_a_network_that_pads_or_normalises_otherwise(options: dict, message: str) -> None:
    made = converted("efficientnet_b0", 2, "blocks.5.0.*", **options)
    with pytest.raises(InputError, match=message):
        to_timm_layout(made)


def test_the_error_for_a_file_read_into_a_network_that_normalises_otherwise(tmp_path: Path) -> None:
    torch.save(timm.create_model("tf_efficientnet_cc_b0_4e").state_dict(), tmp_path / "cc.pth")
    with pytest.raises(
        InputError, match=r"blocks\.4\.0, where the model does not fit: blocks\.4\.0 has a norm with eps"
    ):
        load_model(str(tmp_path / "cc.pth"), arch="timm:efficientnet_b0")


def test_the_error_for_a_padding_that_odconv_has_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), timm.layers.Conv2dSame(8, 8, 3, 2, bias=False))
    made = cs.convert(model, ODConv(2), example=X, prove=False).model
    with pytest.raises(InputError, match="1 pads by the size of its input"):
        to_odconv_layout(made)


def test_every_network_that_timm_has_is_known() -> None:
    assert condconv_names() == [parameters.values[0] for parameters in PUBLISHED]


def test_odconv_out_and_in_by_the_command_line(condconv: CLI, tmp_path: Path) -> None:
    artifact, file, again = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "again"))
    arguments = (
        "--weights",
        "none",
        "--num-classes",
        "3",
        "--input-size",
        "32",
        "--variant",
        "odconv",
        "--experts",
        "2",
    )
    code, _, err = condconv("convert", "torchvision:resnet18", *arguments, "-o", artifact)
    assert code == 0, err
    assert condconv("export", artifact, "--layout", "odconv", "-o", file)[0] == 0
    assert "layer1.0.conv1.attention.fc.weight" in load_file(file)
    code, _, err = condconv("import", file, "-o", again)
    assert code == 0, err
    assert "odconv, 2 experts each" in err
    ours, back = cs.load(artifact), cs.load(again)
    assert conditional_layers(ours).keys() == conditional_layers(back).keys()
    with torch.no_grad():
        torch.testing.assert_close(back(X), ours(X), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain network, as weights and as an artifact, and a converted one."""
    folder = tmp_path_factory.mktemp("files")
    plain = load_model("torchvision:shufflenet_v2_x0_5", weights="none")
    torch.save(plain.state_dict(), folder / "plain.pth")
    cs.save(plain, folder / "plain.safetensors")
    made = cs.convert(plain, ODConv(2), example=X, include=["conv5.*"], prove=False).model
    cs.save(made, folder / "odconv.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "nowhere.pth", "-o", "m.safetensors"), "nowhere.pth is not a file"),
        (("import", "plain.pth", "-o", "m.safetensors"), "plain.pth has no conditional layer"),
        (("import", "plain.pth"), "No output was named"),
        (("export", "plain.safetensors", "--layout", "tim", "-o", "m.safetensors"), "timm"),
        (("export", "plain.safetensors", "--layout", "timm", "-o", "m.safetensors"), "no conditional layer"),
        (("export", "odconv.safetensors", "--layout", "timm", "-o", "m.safetensors"), "has a router of its own"),
    ],
)
def test_mistakes_write_nothing(
    condconv: CLI, files: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(files)
    code, out, err = condconv(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("m.safetensors").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, bias=False))
    made = cs.convert(model, ODConv(2), example=X, prove=False).model
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(InputError, match="could not be written"):
        write_layout(made, "odconv", tmp_path / "taken.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]
