"""Every legal way to convolve equals the per-sample loop, in values and in gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConvGeometry, Mixture, conditional_like
from condconv_surgery.native import kernels
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.ops.implementations import IMPLEMENTATIONS, blockwise, legal_implementations
from condconv_surgery.ops.per_sample import block_sizes as blocking
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.geometries import GEOMETRIES, without_bias
from tests.reference import per_sample_loop
from tests.variant_cases import scramble

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


@pytest.fixture(autouse=True)
def with_torch_alone() -> Iterator[None]:
    """These judge the implementations in torch's operators; ``test_cpp_*.py`` judge the compiled kernels."""
    with kernels(on=False):
        yield


@pytest.mark.parametrize(
    ("parts", "dtype"), [*((parts, torch.float64) for parts in MIXTURES), ("everything", torch.float32)], ids=str
)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_legal_way_equals_the_loop(name: str, parts: str, dtype: torch.dtype) -> None:
    arguments = GEOMETRIES[name]
    geometry = ConvGeometry.make(**without_bias(arguments))
    for batch in (1, 3):
        x, experts, bias, mixture = make_case(geometry, MIXTURES[parts], batch, arguments.get("bias", True), dtype)
        leaves = [t for t in (x, experts, bias, *mixture) if t is not None]
        expected = values_and_gradients(per_sample_loop(x, experts, bias, mixture, geometry), leaves)
        for way in ["auto", *legal_implementations(batch, mixture, geometry)]:
            actual = values_and_gradients(conditional_conv2d(x, experts, bias, mixture, geometry, way), leaves)
            for a, e in zip(actual, expected, strict=True):
                scale = max(1.0, e.abs().max().item())
                assert (a - e).abs().max() <= TOLERANCE[dtype] * scale, way


def test_every_way_is_reached_by_the_table() -> None:
    reached = set()
    for arguments, parts, batch in itertools.product(GEOMETRIES.values(), MIXTURES.values(), (0, 1, 3)):
        geometry = ConvGeometry.make(**without_bias(arguments))
        mixture = make_case(geometry, parts, batch, False, torch.float32)[3]
        reached.update(legal_implementations(batch, mixture, geometry))
    assert reached == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_empty_batch(name: str) -> None:
    geometry = ConvGeometry.make(**without_bias(GEOMETRIES[name]))
    x, experts, bias, mixture = make_case(geometry, MIXTURES["everything"], 0, True, torch.float32)
    y = conditional_conv2d(x, experts, bias, mixture, geometry)
    assert y.shape == torch.nn.Conv2d(**GEOMETRIES[name])(x).shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["3x3", "1x1 strided", "depthwise", "groups"])
def test_channels_last_input_gives_the_same(name: str, way: str) -> None:
    geometry = ConvGeometry.make(**without_bias(GEOMETRIES[name]))
    for parts, batch in itertools.product(("gate", "everything"), (1, 3)):
        x, experts, bias, mixture = make_case(geometry, MIXTURES[parts], batch, True, torch.float64)
        if way not in legal_implementations(batch, mixture, geometry):
            continue
        last = conditional_conv2d(x.to(memory_format=torch.channels_last), experts, bias, mixture, geometry, way)
        torch.testing.assert_close(
            last, conditional_conv2d(x, experts, bias, mixture, geometry, way), rtol=0, atol=1e-12
        )


def test_an_illegal_way_says_which_are_legal() -> None:
    geometry = ConvGeometry.make(8, 12, 3)
    x, experts, bias, mixture = make_case(geometry, ("gate",), 3, True, torch.float32)
    with pytest.raises(
        InputError, match=r"implementation='bmm' cannot .* batch of 3(.|\n)*blockwise, grouped, unfold, mix-outputs"
    ):
        conditional_conv2d(x, experts, bias, mixture, geometry, "bmm")


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


def layer_case(
    kernel: int, groups: int, size: int, batch: int, parts: str, dtype: torch.dtype = torch.float64, stride: int = 1
):
    geometry = ConvGeometry.make(8, 16, kernel, stride, kernel // 2, groups=groups)
    torch.manual_seed(0)
    x, experts, _, mixture = make_case(geometry, MIXTURES[parts], batch, False, dtype)
    x = torch.randn(batch, 8, size, size, dtype=dtype, requires_grad=True)
    return geometry, x, experts, mixture, [t for t in (x, experts, *mixture) if t is not None]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [3, 12], ids=["scales on activations", "scales in kernels"])
@pytest.mark.parametrize(("kernel", "groups", "stride"), [(1, 1, 1), (1, 1, 2), (1, 4, 1), (3, 1, 1), (3, 8, 1)])
@pytest.mark.parametrize("fewest", [5, 16], ids=["some filters", "all filters"])
@pytest.mark.parametrize("parts", ["gate", "everything", "scales", "spatial"])
def test_blocks_of_few_samples_and_filters_equal_the_loop(
    parts: str,
    fewest: int,
    kernel: int,
    groups: int,
    stride: int,
    size: int,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    geometry, x, experts, mixture, leaves = layer_case(kernel, groups, size, 5, parts, stride=stride)
    monkeypatch.setattr(blocking, "MAX_KERNEL_BYTES", 2 * geometry.weight_numel * 8)
    monkeypatch.setattr(blocking, "MAX_CACHED_BYTES", 2 * geometry.weight_numel * fewest // 2)
    monkeypatch.setattr(blocking, "MIN_FILTERS", fewest)
    y = conditional_conv2d(x.to(memory_format=memory_format), experts, None, mixture, geometry, "blockwise")
    assert y.is_contiguous(memory_format=memory_format)
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
    for a, e in zip(values_and_gradients(y, leaves), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "groups", "filters", "samples"),
    [
        ((4, 512, 512, 3, 3), 1, 128, 4),  # 10 MiB of experts, and as much of kernels
        ((4, 128, 128, 3, 3), 1, 128, 17),  # all experts fit
        ((8, 1280, 320, 1, 1), 1, 1280 // 2, 12),
        ((1, 512, 512, 3, 3), 1, 512, 1),
        ((64, 128, 128, 3, 3), 1, 64, 35),  # no fewer filters, whatever the experts
        ((4, 960, 1, 3, 3), 960, 960, 22),
    ],
    ids=str,
)
def test_a_block_and_its_experts_fit_in_the_cache(
    shape: tuple[int, ...], groups: int, filters: int, samples: int
) -> None:
    experts = torch.empty(shape, device="meta")
    x = torch.empty(64, shape[2] * groups, 7, 7)
    blocks_found = blocking.blocks_of(x, experts, groups)
    assert (blocks_found[0].filters.stop, blocks_found[0].size) == (filters, samples)
    covered = torch.zeros(64, shape[1], dtype=torch.int)
    for block in blocks_found:
        covered[block.samples, block.filters] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("wanted", range(6))
@pytest.mark.parametrize("kernel", [1, 3])
def test_blocks_give_each_gradient_alone(kernel: int, wanted: int) -> None:
    geometry, x, experts, mixture, leaves = layer_case(kernel, 1, 12, 3, "everything")
    expected = values_and_gradients(
        conditional_conv2d(x, experts, None, mixture, geometry, "grouped"), [leaves[wanted]]
    )[1]
    for leaf in leaves:
        leaf.requires_grad_(leaf is leaves[wanted])
    y = conditional_conv2d(x, experts, None, mixture, geometry, "blockwise")
    torch.testing.assert_close(values_and_gradients(y, [leaves[wanted]])[1], expected, rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler while it traces
def test_blocks_pass_the_checks_of_an_operator() -> None:
    for kernel in (1, 3):
        geometry, x, experts, mixture, _ = layer_case(kernel, 1, 5, 3, "everything")
        padding = kernel // 2
        shape = ([1, 1], [padding, padding], [1, 1], geometry.groups)
        torch.library.opcheck(blockwise._forward, (x, experts, *mixture, *shape, False))
        torch.library.opcheck(blockwise._forward, (x, experts, mixture.gate, None, None, None, *shape, True))


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 8)])
@pytest.mark.parametrize("block", [2, 64])
def test_kernels_are_kept_for_backward_where_they_are_small_and_unscaled(
    block: int, kernel: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry, x, experts, mixture, leaves = layer_case(kernel, groups, 10, 5, "gate")
    for bound in ("MAX_KERNEL_BYTES", "MAX_CACHED_BYTES"):
        monkeypatch.setattr(blocking, bound, block * geometry.weight_numel * 8)
    monkeypatch.setattr(blocking, "MIN_FILTERS", 5)
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
    for share, keeps in ((1e6, True), (0, False)):
        monkeypatch.setattr(blockwise, "MAX_KEPT_SHARE", share)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = conditional_conv2d(x, experts, None, mixture, geometry, "blockwise")
        assert (5 * geometry.weight_numel in {t.numel() for t in kept}) == keeps
        for a, e in zip(values_and_gradients(y, leaves), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("parts", "size"), [("everything", 12), ("gate", 1)], ids=["scaled", "large kernels"])
def test_blocks_keep_no_kernel_for_backward(parts: str, size: int) -> None:
    geometry, x, experts, mixture, leaves = layer_case(3, 1, size, 64, parts)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conditional_conv2d(x, experts, None, mixture, geometry, "blockwise")
    assert {t.data_ptr() for t in kept if t.numel()} == {t.data_ptr() for t in leaves}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conditional_conv2d(x, experts, None, mixture, geometry, "grouped")
    assert max(t.numel() for t in kept) >= 64 * geometry.weight_numel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", ["gate", "everything"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_gives_its_dtype_and_exact_enough_gradients(kernel: int, parts: str, dtype: torch.dtype) -> None:
    geometry, x, experts, mixture, leaves = layer_case(kernel, 1, 12, 3, parts, torch.float32)
    expected = values_and_gradients(conditional_conv2d(x, experts, None, mixture, geometry), leaves)
    with torch.autocast("cpu", dtype):
        y = conditional_conv2d(x, experts, None, mixture, geometry)
    assert y.dtype == dtype
    for a, e in zip(values_and_gradients(y, leaves)[1:], expected[1:], strict=True):
        assert a.dtype == torch.float32
        assert (a - e).abs().max() <= 0.05 * e.abs().max()


class Two(torch.nn.Module):
    """A dense and a 1x1 layer, as a model for the compiler."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.first = conditional_like(torch.nn.Conv2d(6, 12, 3, padding=1), variant)
        self.second = conditional_like(torch.nn.Conv2d(12, 6, 1), variant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("variant", [CondConv(experts=4), ODConv(experts=4), ODConv(experts=1)], ids=str)
def test_one_compiled_graph_serves_every_batch(variant: Variant) -> None:
    # no two dimensions alike: the compiler takes equal ones for one symbol
    compare_compiled(Two(variant), [torch.randn(batch, 6, 9, 9) for batch in (8, 16, 32)], 1e-5)


def compare_compiled(model: torch.nn.Module, pictures: list[torch.Tensor], tolerance: float) -> None:
    """One graph serves all pictures, with the values of the model that is not compiled."""
    scramble(model)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, dynamic=True, backend=backend)
    for x in pictures:
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=tolerance)
    assert len(graphs) == 1


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_other_devices_equal_the_loop(name: str, device: str) -> None:
    present = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    if not present:
        pytest.skip(f"no {device} device here")
    geometry = ConvGeometry.make(**without_bias(GEOMETRIES[name]))
    x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 3, False, torch.float32)
    leaves = [x, experts, *mixture]
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
    moved = [t.detach().to(device).requires_grad_() for t in leaves]
    for way in ["auto", *legal_implementations(3, mixture, geometry)]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y = conditional_conv2d(moved[0], moved[1], None, Mixture(*moved[2:]), geometry, way)
            direction = torch.linspace(-1, 1, y.numel()).view(y.shape).to(device)
            found = [y, *torch.autograd.grad(y, moved, direction)]
        for a, e in zip(found, expected, strict=True):
            assert (a.cpu() - e).abs().max() <= 1e-4 * max(1.0, e.abs().max().item()), way


@pytest.mark.parametrize("way", ["blockwise", "grouped", "unfold", "mix-outputs", "mix-inputs"])
def test_experts_may_be_more_exact_than_pictures(way: str) -> None:
    geometry, x, experts, mixture, _ = layer_case(3, 1, 12, 3, "gate")
    expected = conditional_conv2d(x, experts, None, mixture, geometry, way)
    found = conditional_conv2d(x.bfloat16(), experts.float(), None, mixture, geometry, way)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.3)


def test_a_scale_alone_is_differentiated_in_every_way() -> None:
    geometry, x, experts, mixture, leaves = layer_case(3, 1, 12, 3, "everything")
    for leaf in leaves:
        leaf.requires_grad_(leaf is mixture.spatial)
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), [mixture.spatial])
    for way in legal_implementations(3, mixture, geometry):
        found = values_and_gradients(conditional_conv2d(x, experts, None, mixture, geometry, way), [mixture.spatial])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", [CondConv(experts=4), ODConv(experts=4), DynamicConv(experts=4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_casts_what_it_casts_for_a_plain_convolution(dtype: torch.dtype, variant: Variant) -> None:
    plain = torch.nn.Conv2d(6, 12, 3).to(dtype)
    layer = conditional_like(plain, variant)
    x = torch.randn(2, 6, 8, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(x), layer(x)
    assert found.dtype == expected.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
