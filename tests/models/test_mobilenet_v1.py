"""MobileNetV1: published costs, its name in files and on the command line, arguments out of range."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.container import read_recipe
from condconv_surgery.models.artifact.meta_init import UninitialisedOnMeta
from condconv_surgery.models.mobilenet_v1 import CONDCONV_LAYERS
from condconv_surgery.recipe import Source, recipe_of
from condconv_surgery.reporting.measure.cost_table import Profile
from condconv_surgery.reporting.measure.profile import profile
from tests.training.forked import fresh_python
from tests.variant_cases import scramble

IMAGE = torch.empty(1, 3, 224, 224, device="meta")

COSTS = {  # millions of MACs with 1, 2, 4, 8, 16, 32 experts, without routers and the mixing of biases
    0.25: (41.0, 41.9, 42.8, 44.7, 48.3, 55.6),
    0.50: (149.5, 152.1, 154.6, 159.8, 170.1, 190.6),
    0.75: (325.4, 330.4, 335.4, 345.3, 365.3, 405.2),
    1.00: (568.7, 576.9, 585.1, 601.4, 634.0, 699.2),
}

PARAMETERS = {  # millions with 1, 8, 32 experts, without batch norms, routers and biases of experts
    0.25: (0.46, 3.6, 14.5),
    0.50: (1.32, 10.3, 41.2),
    0.75: (2.57, 20.0, 79.9),
    1.00: (4.21, 32.8, 130.6),
}


def on_meta(width: float, experts: int, include: tuple[str, ...] = CONDCONV_LAYERS) -> nn.Module:
    """No memory: 130 million parameters with 32 experts at width 1."""
    with UninitialisedOnMeta():
        model = cs.mobilenet_v1(width).to("meta").eval()  # to: buffers too
        if experts == 1:
            return model
        options = {"classifier": "classifier.1" in include, "start": "antithetic", "prove": False, "inplace": True}
        return cs.convert(model, cs.CondConv(experts), include=include, example=IMAGE, **options).model


def parameters_of(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(p.numel() for m in model.modules() if isinstance(m, kind) for p in m.parameters(recurse=False))


@pytest.mark.parametrize("experts", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("width", COSTS)
def test_costs_of_each_width_and_number_of_experts(width: float, experts: int) -> None:
    """The figure of CondConv (Yang et al. 2019): by our count, and in total by torch's own."""
    model = on_meta(width, experts)
    found = profile(model)
    with FlopCounterMode(display=False) as meter:
        model(IMAGE)
    assert meter.get_total_flops() == 2 * found.macs.total
    biases = 1000 * experts if experts > 1 else 0
    weights_only = (found.macs.total - found.macs.routing - biases) / 1e6
    assert round(weights_only, 1) == pytest.approx(COSTS[width][(1, 2, 4, 8, 16, 32).index(experts)])
    if experts in (1, 8, 32):
        routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
        weights = found.parameters - parameters_of(model, nn.BatchNorm2d) - routers - 1000 * (experts - 1)
        assert weights / 1e6 == pytest.approx(PARAMETERS[width][(1, 8, 32).index(experts)], abs=0.06)


@pytest.mark.parametrize(
    ("include", "millions"),
    [
        (CONDCONV_LAYERS, 55.7),
        (CONDCONV_LAYERS[:2], 47.6),
        (("classifier.1",), 49.3),
        (("features.1[23].*", "classifier.1"), 52.5),
    ],
)
def test_published_macs_with_32_experts(include: tuple[str, ...], millions: float) -> None:
    """CondConv, ablations on MobileNetV1 0.25: with everything that we count, routers too."""
    assert profile(on_meta(0.25, 32, include)).macs.total / 1e6 == pytest.approx(millions, rel=0.004)


def test_published_size_of_mobilenet_v1() -> None:
    """Howard et al. 2017, table 6 and 8: 569 M and 149 M MACs, 4.2 M and 1.3 M parameters; timm's has 4,231,976."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("mobilenetv1_100")
    found: Profile = profile(on_meta(1.0, 1))
    assert found.parameters == sum(p.numel() for p in theirs.parameters()) == 4_231_976
    assert found.macs.total / 1e6 == pytest.approx(569, abs=0.5)
    assert round(profile(on_meta(0.5, 1)).macs.total / 1e6) == 149


def test_it_computes_what_timm_computes() -> None:
    """Same weights in timm's modules, in the order of definition."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours, theirs = cs.mobilenet_v1(num_classes=7), timm.create_model("mobilenetv1_100", num_classes=7)
    scramble(ours)
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        other.copy_(mine)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


def test_norms_and_initial_weights_are_those_of_torchvisions_mobilenet_v2() -> None:
    torch.manual_seed(0)
    model = cs.mobilenet_v1()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
    std = {name: float(value.std()) for name, value in model.state_dict().items() if value.dim() > 1}
    assert std["features.13.1.0.weight"] == pytest.approx((2 / 1024) ** 0.5, rel=0.01)  # fan out
    assert std["features.13.0.0.weight"] == pytest.approx((2 / (1024 * 9)) ** 0.5, rel=0.05)
    assert std["classifier.1.weight"] == pytest.approx(0.01, rel=0.01)


def test_small_images_keep_their_resolution() -> None:
    x = torch.randn(2, 1, 32, 32)
    model = cs.mobilenet_v1(0.25, 5, in_channels=1, stem_stride=1)
    assert model.features(x).shape[2:] == (2, 2)
    assert cs.mobilenet_v1(0.25, 5, in_channels=1).features(x).shape[2:] == (1, 1)
    assert model(x).shape == (2, 5)


OPTIONS = {"width": 0.25, "num_classes": 7, "in_channels": 1, "dropout": 0.1, "stem_stride": 1}


def test_an_artifact_comes_back_in_a_fresh_process(tmp_path: Path) -> None:
    """By its name and options, so without a description of its modules; converted, with the classifier."""
    torch.manual_seed(0)
    conversion = cs.convert(
        cs.mobilenet_v1(**OPTIONS),
        cs.CondConv(2),
        example=torch.randn(2, 1, 32, 32),
        include=CONDCONV_LAYERS,
        classifier=True,
    )
    model = conversion.model.eval()
    scramble(model)
    cs.save(model, tmp_path / "m.safetensors")
    assert read_recipe(tmp_path / "m.safetensors").source == Source("condconv:mobilenet_v1", OPTIONS)
    x = torch.randn(3, 1, 32, 32)
    torch.save((x, model(x)), tmp_path / "outputs.pt")
    code = (
        "import torch, condconv_surgery as cs; x, y = torch.load('outputs.pt');"
        "print(torch.allclose(cs.load('m.safetensors')(x), y, rtol=1e-5, atol=1e-6))"
    )
    done = fresh_python(code, folder=tmp_path)
    assert done.stdout == "True\n", done.stderr


def test_a_changed_network_comes_back_from_its_description(tmp_path: Path) -> None:
    model = cs.mobilenet_v1(0.25, 5).eval()
    model.classifier.append(nn.Tanh())
    cs.save(model, tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(x), model(x))


def test_the_command_line_knows_it_by_name(condconv, tmp_path: Path) -> None:
    code, _, err = condconv(
        "convert",
        "condconv:mobilenet_v1_x0_25",
        "--weights",
        "none",
        "--experts",
        2,
        "--classifier",
        *(word for pattern in CONDCONV_LAYERS for word in ("--include", pattern)),
        "-o",
        tmp_path / "m.safetensors",
    )
    assert code == 0, err
    model = cs.load(tmp_path / "m.safetensors")
    assert recipe_of(model).source == Source("condconv:mobilenet_v1_x0_25")
    assert len(recipe_of(model).layers) == 17


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v1_x0_25", "mobilenet_v1_x0_5", "mobilenet_v1_x0_75"])
def test_a_file_of_weights_is_recognised(name: str, tmp_path: Path) -> None:
    model = cs.load_model(f"condconv:{name}", num_classes=4)
    scramble(model)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    loaded = cs.load_model(tmp_path / "m.pt")
    assert recipe_of(loaded).source == Source(f"condconv:{name}", {"num_classes": 4})
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_an_unknown_name_shows_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"Unknown condconv model 'mobilenet_v4'(.|\n)*mobilenet_v1"):
        cs.load_model("condconv:mobilenet_v4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 17.0}, "at most 16"),
        ({"width": float("nan")}, "width is nan"),
        ({"width": "0.5"}, "width is '0.5'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 2.0}, "in_channels is 2.0"),
        ({"stem_stride": 3}, "It must be 1 or 2"),
    ],
)
def test_arguments_out_of_range(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        cs.mobilenet_v1(**options)
