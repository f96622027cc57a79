"""Each form of a layer against the layer, over the table of geometries, without an exporter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.deploy.forms.constant_kernels import ConstantKernels
from condconv_surgery.deploy.forms.graph_forms import FORMS, layer_cases
from condconv_surgery.deploy.forms.serving_form import serving_form
from condconv_surgery.deploy.runtimes.onnx_file import Onnx
from condconv_surgery.layers import CondConv2d, conditional_like
from condconv_surgery.layers.weight_forms.weight_standardisation import WeightStandardisation
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.geometries import GEOMETRIES
from tests.variant_cases import scramble

VARIANTS: list[Variant] = [
    CondConv(3),
    CondConv(1),
    DynamicConv(2, temperature=3.0),
    ODConv(1, spatial=False),
    ODConv(1, heads="all", norm="none", temperature=2.0),
    ODConv(3, heads="all"),
    ODConv(3, gates="sigmoid", activation="none"),
]
BATCHES = {"kernel": 1, "grouped": 3}


def network(layer: nn.Module) -> nn.Module:
    scramble(layer)
    return nn.Sequential(layer, nn.ReLU()).double().eval()


def assert_equal_in_every_form(model: nn.Module, x: Tensor) -> set[str]:
    """Returns the forms that were possible."""
    reached = set()
    for form in FORMS:
        batch = BATCHES.get(form)
        images = x[: batch or len(x)]
        if any(case.why_not(form) for case in layer_cases(model, batch).values()):
            continue
        served, forms, _ = serving_form(model, form=form, preferred=FORMS, batch=batch)
        with torch.no_grad():
            torch.testing.assert_close(served(images), model(images), rtol=1e-6, atol=1e-6, msg=form)
        assert set(forms.values()) == {form}
        reached.add(form)
    return reached


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_possible_form_is_equal(name: str) -> None:
    torch.manual_seed(0)
    reached = set[str]()
    for variant in VARIANTS:
        model = network(conditional_like(nn.Conv2d(**GEOMETRIES[name]), variant))
        x = torch.randn(3, GEOMETRIES[name]["in_channels"], 11, 10, dtype=torch.float64)
        reached |= assert_equal_in_every_form(model, x)
    assert reached == set(FORMS)


def test_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = network(conditional_like(nn.Linear(6, 4), CondConv(2)))
    assert "sum" in assert_equal_in_every_form(model, torch.randn(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("variant", [ODConv(1, spatial=False), CondConv(2)], ids=str)
def test_a_standardised_layer(variant: Variant) -> None:
    torch.manual_seed(0)
    layer = conditional_like(nn.Conv2d(6, 4, 3), variant)
    layer.standardisation = WeightStandardisation(1e-6, 0.7, torch.rand(4) + 0.5)
    reached = assert_equal_in_every_form(network(layer), torch.randn(3, 6, 9, 9, dtype=torch.float64))
    assert ("scale" in reached) == (variant.experts == 1)
    assert "sum" not in reached


class Block(nn.Module):
    """Two layers that one router serves."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm, self.project = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(torch.relu(self.norm(self.expand(x))))


def test_layers_that_share_a_router() -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv2d(3, 6, 1), Block(), Block()), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    variant = CondConv(2, routing="block")
    model = cs.convert(plain.double(), variant, example=x, blocks=["1", "2"]).model.eval()
    scramble(model)
    assert assert_equal_in_every_form(model, x) == {"sum", "matmul", "loop", "kernel", "grouped"}


def test_a_layer_under_two_names_stays_one() -> None:
    torch.manual_seed(0)
    layer = CondConv2d(3, 3, 3, padding=1, variant=CondConv(2))
    scramble(layer)
    model, x = nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(2, 3, 8, 8)
    served, forms, _ = serving_form(model, form="sum", preferred=FORMS, batch=None)
    assert isinstance(served[0], ConstantKernels)
    assert served[0] is served[2]
    assert forms == {"0": "sum"}
    torch.testing.assert_close(served(x), model(x), rtol=1e-5, atol=1e-5)
    assert model[0] is layer, "the model is a copy"


def test_the_forms_that_are_chosen() -> None:
    """Of a 1x1, a dense and a depthwise layer for ONNX Runtime, by the time of whole networks."""
    convolutions = (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    for variant, batch, static, forms, in_a_loop in (
        (ODConv(1, spatial=False), None, 0, ["scale", "scale", "scale"], False),
        (ODConv(1), None, 0, ["kernel", "kernel", "kernel"], True),
        (ODConv(1), 1, 9, ["kernel", "kernel", "kernel"], False),
        (ODConv(1), None, 4, ["scale", "loop", "loop"], False),
        (CondConv(4), None, 3, ["kernel", "kernel", "kernel"], True),
        (CondConv(4), None, 4, ["matmul", "loop", "loop"], False),
        (CondConv(4), 3, 0, ["matmul", "loop", "loop"], False),
    ):
        model = nn.Sequential(*(conditional_like(one, variant) for one in convolutions)).eval()
        model.extend(nn.Conv2d(8, 8, 1) for _ in range(static))  # faster in batches than in a loop
        chosen = serving_form(model, form="auto", preferred=Onnx.preferred, batch=batch, loops=True)
        assert (list(chosen.forms.values()), chosen.in_a_loop) == (forms, in_a_loop)
