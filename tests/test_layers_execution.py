"""Every legal way to convolve equals the per-sample loop, in values and in gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConvGeometry, Mixture
from condconv_surgery.layers.execution import WAYS, execute, legal_ways
from tests.geometries import GEOMETRIES, without_bias
from tests.reference import per_sample_loop

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # the reference loop

MIXTURES = {
    "gate": ("gate",),
    "gate and scales": ("gate", "in_scale", "out_scale"),
    "everything": ("gate", "spatial", "in_scale", "out_scale"),
    "scales": ("in_scale", "out_scale"),
    "spatial": ("spatial", "in_scale"),
    "nothing": (),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def make_case(geometry: ConvGeometry, parts: tuple[str, ...], batch: int, bias: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    experts = 3 if "gate" in parts else 1
    g = geometry
    shapes = {
        "gate": (batch, experts),
        "spatial": (batch, *g.kernel_size),
        "in_scale": (batch, g.in_channels),
        "out_scale": (batch, g.out_channels),
    }

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    mixture = Mixture(**{part: leaf(*shapes[part]) for part in parts})
    return (
        leaf(batch, g.in_channels, 11, 10),
        leaf(experts, *g.weight_shape),
        leaf(experts, g.out_channels) if bias else None,
        mixture,
    )


def values_and_gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, leaves, direction, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("parts", MIXTURES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_legal_way_equals_the_loop(name: str, parts: str, dtype: torch.dtype) -> None:
    arguments = GEOMETRIES[name]
    geometry = ConvGeometry.make(**without_bias(arguments))
    for batch in (1, 3):
        x, experts, bias, mixture = make_case(geometry, MIXTURES[parts], batch, arguments.get("bias", True), dtype)
        leaves = [t for t in (x, experts, bias, *mixture) if t is not None]
        expected = values_and_gradients(per_sample_loop(x, experts, bias, mixture, geometry), leaves)
        for way in ["auto", *legal_ways(batch, mixture, geometry)]:
            actual = values_and_gradients(execute(x, experts, bias, mixture, geometry, way), leaves)
            for a, e in zip(actual, expected, strict=True):
                scale = max(1.0, e.abs().max().item())
                assert (a - e).abs().max() <= TOLERANCE[dtype] * scale, way


def test_every_way_is_reached_by_the_table() -> None:
    reached = set()
    for arguments, parts, batch in itertools.product(GEOMETRIES.values(), MIXTURES.values(), (0, 1, 3)):
        geometry = ConvGeometry.make(**without_bias(arguments))
        mixture = make_case(geometry, parts, batch, False, torch.float32)[3]
        reached.update(legal_ways(batch, mixture, geometry))
    assert reached == set(WAYS)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_empty_batch(name: str) -> None:
    geometry = ConvGeometry.make(**without_bias(GEOMETRIES[name]))
    x, experts, bias, mixture = make_case(geometry, MIXTURES["everything"], 0, True, torch.float32)
    y = execute(x, experts, bias, mixture, geometry)
    assert y.shape == torch.nn.Conv2d(**GEOMETRIES[name])(x).shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["3x3", "1x1 strided", "depthwise", "groups"])
def test_channels_last_input_gives_the_same(name: str, way: str) -> None:
    geometry = ConvGeometry.make(**without_bias(GEOMETRIES[name]))
    for parts, batch in itertools.product(("gate", "everything"), (1, 3)):
        x, experts, bias, mixture = make_case(geometry, MIXTURES[parts], batch, True, torch.float64)
        if way not in legal_ways(batch, mixture, geometry):
            continue
        last = execute(x.to(memory_format=torch.channels_last), experts, bias, mixture, geometry, way)
        torch.testing.assert_close(last, execute(x, experts, bias, mixture, geometry, way), rtol=0, atol=1e-12)


def test_an_illegal_way_says_which_are_legal() -> None:
    geometry = ConvGeometry.make(8, 12, 3)
    x, experts, bias, mixture = make_case(geometry, ("gate",), 3, True, torch.float32)
    with pytest.raises(InputError, match=r"execution='bmm' cannot .* batch of 3(.|\n)*grouped, outputs"):
        execute(x, experts, bias, mixture, geometry, "bmm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(groups=3), "groups=3 with 8 input and 12 output"),
        (dict(groups=0), "groups=0"),
        (dict(padding_mode="mirror"), "padding_mode is 'mirror'"),
        (dict(padding="full"), "padding is 'full'"),
        (dict(padding="same", stride=2), "padding='same' with stride 2"),
    ],
)
def test_a_geometry_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvGeometry.make(8, 12, 3, **arguments)
