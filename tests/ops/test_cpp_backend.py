"""The compiled kernels are the same function as the per-sample loop, in values and in gradients."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from condconv_surgery import native
from condconv_surgery.layers import CondConv2d, ConvGeometry, Mixture, ODConv2d
from condconv_surgery.native import kernels
from condconv_surgery.ops.backends.cpp.cpp_convolution import fast_convolve, supports
from condconv_surgery.ops.choose_implementation import choose
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.ops.implementations import blockwise
from condconv_surgery.recipe import CondConv
from tests.geometries import GEOMETRIES, without_bias
from tests.needs_kernels import needs_kernels
from tests.ops.test_implementations import MIXTURES, make_case, values_and_gradients
from tests.reference import per_sample_loop

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # the reference loop

MORE = {
    "pixels that no tap reaches": dict(in_channels=5, out_channels=9, kernel_size=2, stride=3),
    "stride 2, dilation 2": dict(in_channels=5, out_channels=9, kernel_size=3, stride=2, padding=1, dilation=2),
    "uneven everything": dict(
        in_channels=5, out_channels=17, kernel_size=(3, 5), stride=(2, 1), padding=(2, 1), dilation=(1, 2)
    ),
    "several panels and chunks": dict(in_channels=70, out_channels=50, kernel_size=3, padding=1),
    "phases of one tap that take turns": dict(in_channels=130, out_channels=20, kernel_size=2, stride=2),
    "depthwise, blocks of channels": dict(in_channels=70, out_channels=70, kernel_size=3, padding=1, groups=70),
    "panels that take turns": dict(in_channels=170, out_channels=300, kernel_size=1),
    "1x1, several chunks": dict(in_channels=320, out_channels=40, kernel_size=1),
    "1x1 with strides": dict(in_channels=20, out_channels=40, kernel_size=1, stride=(2, 3)),
    "whole panels": dict(in_channels=64, out_channels=32, kernel_size=3, padding=1),
    "1x1, strides and padding": dict(in_channels=4, out_channels=16, kernel_size=1, stride=2, padding=1),
    "more padding than kernel": dict(in_channels=4, out_channels=16, kernel_size=1, padding=2),
    "depthwise, rows of every length": dict(in_channels=3, out_channels=3, kernel_size=3, padding=1, groups=3),
    "depthwise 5x5, stride 2": dict(in_channels=4, out_channels=4, kernel_size=5, stride=2, padding=2, groups=4),
    "depthwise, pixels that no tap reaches": dict(in_channels=3, out_channels=3, kernel_size=2, stride=3, groups=3),
    "depthwise, uneven everything": dict(
        in_channels=3, out_channels=3, kernel_size=(5, 3), stride=(1, 3), padding=(1, 3), dilation=(2, 1), groups=3
    ),
    "depthwise, stride 2 one way": dict(
        in_channels=3, out_channels=3, kernel_size=3, stride=(2, 1), padding=2, dilation=(1, 2), groups=3
    ),
    "depthwise, more padding than kernel": dict(
        in_channels=2, out_channels=2, kernel_size=(1, 2), padding=(2, 3), groups=2
    ),
    "depthwise, large kernel": dict(in_channels=2, out_channels=2, kernel_size=9, padding=4, groups=2),
    "depthwise, one column": dict(in_channels=3, out_channels=3, kernel_size=(15, 1), padding=(7, 0), groups=3),
    "depthwise, dilation as the stride": dict(
        in_channels=3, out_channels=3, kernel_size=(4, 3), stride=2, padding=3, dilation=2, groups=3
    ),
    "depthwise, a factor": dict(in_channels=70, out_channels=70, kernel_size=1, groups=70),
    "large kernel": dict(in_channels=3, out_channels=16, kernel_size=9, padding=4),
    "groups, stride 2": dict(in_channels=24, out_channels=36, kernel_size=3, stride=2, padding=1, groups=3),
    "groups of several panels and chunks": dict(in_channels=60, out_channels=80, kernel_size=3, padding=1, groups=2),
    "groups, 1x1 of several chunks": dict(in_channels=180, out_channels=24, kernel_size=1, stride=2, groups=2),
    "groups, uneven everything": dict(
        in_channels=6, out_channels=10, kernel_size=(3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2
    ),
    "single chunk, more samples than are mixed together": dict(in_channels=4, out_channels=40, kernel_size=3),
}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """For this processor, or for one that has the instructions given."""
    with pytest.MonkeyPatch.context() as patch:
        if has := getattr(request, "param", None):
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has)
        with kernels(on=True):
            yield
    if native.is_enabled():  # for this processor again
        native.enable()


every_build = pytest.mark.parametrize(
    "compiled", [None, *(["AVX2"] if torch.backends.cpu.get_cpu_capability() != "AVX2" else [])], indirect=True
)


def by_blocks(*arguments: object) -> torch.Tensor:
    return conditional_conv2d(*arguments, implementation="blockwise")


def taken(x: torch.Tensor, experts: torch.Tensor, geometry: ConvGeometry) -> bool:
    return supports(x, experts, geometry)


def assert_equals_the_loop(
    x: torch.Tensor,
    experts: torch.Tensor,
    mixture: Mixture,
    geometry: ConvGeometry,
    leaves: list[torch.Tensor],
    tolerance: float = 2e-5,
) -> None:
    """In values, and in the gradients of ``leaves``."""
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
    actual = values_and_gradients(by_blocks(x, experts, None, mixture, geometry), leaves)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item())


@pytest.mark.usefixtures("compiled")
class TestCompiled:
    pytestmark = needs_kernels

    @every_build
    @pytest.mark.parametrize("parts", MIXTURES)
    @pytest.mark.parametrize("name", [*GEOMETRIES, *MORE])
    def test_equals_the_loop(self, name: str, parts: str) -> None:
        arguments = {**GEOMETRIES, **MORE}[name]
        geometry = ConvGeometry.make(**without_bias(arguments))
        for batch in (1, 2, 7):
            x, experts, bias, mixture = make_case(geometry, MIXTURES[parts], batch, False, torch.float32)
            if not taken(x, experts, geometry):
                assert geometry.pointwise
                return
            leaves = [t for t in (x, experts, *mixture) if t is not None]
            expected = values_and_gradients(per_sample_loop(x, experts, bias, mixture, geometry), leaves)
            actual = values_and_gradients(by_blocks(x, experts, bias, mixture, geometry), leaves)
            with torch.no_grad():  # past the operator, and for views of other strides
                strided = x.transpose(2, 3).contiguous().transpose(2, 3)
                for view in (x, strided):
                    if not supports(view, experts, geometry):
                        continue
                    assert torch.equal(by_blocks(view, experts, bias, mixture, geometry), actual[0])
                    fast = fast_convolve("auto", view, experts, mixture, geometry)
                    if fast is None:
                        assert mixture.gate is None
                        assert mixture.spatial is None
                    else:
                        assert torch.equal(conditional_conv2d(view, experts, bias, mixture, geometry), actual[0])
            for a, e in zip(actual, expected, strict=True):
                assert (a - e).abs().max() <= 2e-5 * max(1.0, e.abs().max().item())

    @every_build
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("filters", [5, 40])
    def test_more_positions_than_are_added_up_at_a_time(self, filters: int, batch: int) -> None:
        geometry = ConvGeometry.make(3, filters, 3, padding=1)
        torch.manual_seed(0)
        x, gate = torch.randn(batch, 3, 67, 129, requires_grad=True), torch.rand(batch, 4, requires_grad=True)
        weight = torch.randn(4, *geometry.weight_shape, requires_grad=True)
        assert_equals_the_loop(x, weight, Mixture(gate), geometry, [x, weight, gate])

    @every_build
    @pytest.mark.parametrize("name", ["3x3", "whole panels", "several panels and chunks"])
    def test_every_count_of_experts(self, name: str) -> None:
        geometry = ConvGeometry.make(**without_bias({**GEOMETRIES, **MORE}[name]))
        torch.manual_seed(0)
        for experts, batch in itertools.product((1, 2, 3, 4, 7, 8, 9, 33), (1, 5, 12)):
            x, gate = torch.randn(batch, geometry.in_channels, 6, 7), torch.rand(batch, experts, requires_grad=True)
            weight = torch.randn(experts, *geometry.weight_shape, requires_grad=True)
            assert_equals_the_loop(x, weight, Mixture(gate), geometry, [weight, gate])

    def test_a_batch_whose_padded_input_is_cut(self) -> None:
        """More than is padded at a time, so that gradients add up over several parts."""
        geometry = ConvGeometry.make(32, 20, 3, 1, 1)
        x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 3, False, torch.float32)
        x = torch.randn(3, 32, 256, 256, requires_grad=True)
        leaves = [x, *(t for t in (experts, *mixture) if t is not None)]
        assert_equals_the_loop(x, experts, mixture, geometry, leaves, tolerance=1e-4)

    @pytest.mark.parametrize(
        "geometry",
        [
            ConvGeometry.make(40, 24, 3, 2, 1),
            ConvGeometry.make(20, 200, 3, 1, 1),
            ConvGeometry.make(90, 600, 1),
            ConvGeometry.make(70, 70, 3, 1, 1, groups=70),
        ],
    )
    def test_threads_change_no_bit(self, geometry: ConvGeometry) -> None:
        x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 5, False, torch.float32)
        leaves = [t for t in (x, experts, *mixture) if t is not None]
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 5, 16):
                torch.set_num_threads(threads)
                found.append(values_and_gradients(by_blocks(x, experts, None, mixture, geometry), leaves))
        finally:
            torch.set_num_threads(before)
        for one, other in itertools.pairwise(found):
            exact = 2 if geometry.depthwise else len(one)  # there torch's products make the gradients of the mixture
            assert all(torch.equal(a, b) for a, b in zip(one[:exact], other[:exact], strict=True))
            for a, b in zip(one[exact:], other[exact:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def test_only_what_is_asked_for(self) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 3, False, torch.float32)
        leaves = [x, experts, *mixture]
        expected = torch.autograd.grad(per_sample_loop(x, experts, None, mixture, geometry).sum(), leaves)
        fixed = Mixture(*(part.detach() for part in mixture))
        for given, asked in (
            ((x.detach(), experts.detach(), mixture), [2, 3, 4, 5]),
            ((x, experts.detach(), fixed), [0]),
            ((x.detach(), experts, fixed), [1]),
        ):
            y = by_blocks(given[0], given[1], None, given[2], geometry)
            found = torch.autograd.grad(y.sum(), [leaves[i] for i in asked])
            for i, a in zip(asked, found, strict=True):
                assert (a - expected[i]).abs().max() <= 2e-5 * expected[i].abs().max()

    @pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
    def test_inputs_that_are_views(self, layout: str) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        _, experts, _, mixture = make_case(geometry, MIXTURES["gate and scales"], 3, False, torch.float32)
        x = {
            "strided": torch.randn(3, 8, 18, 20)[:, :, ::2, ::2],
            "transposed": torch.randn(3, 8, 10, 9).transpose(2, 3),
            "expanded": torch.randn(1, 8, 9, 10).expand(3, -1, -1, -1),
        }[layout].requires_grad_()
        leaves = [x, experts]
        expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
        actual = values_and_gradients(by_blocks(x, experts, None, mixture, geometry), leaves)
        for a, e in zip(actual, expected, strict=True):
            assert (a - e).abs().max() <= 1e-4

    def test_scales_alone_go_into_kernels_that_are_not_large(self) -> None:
        scales = Mixture(in_scale=torch.ones(2, 1), out_scale=torch.ones(2, 1))
        for pixels, expected in ((14, "blockwise"), (12, "blockwise"), (11, "static"), (7, "static")):
            geometry, x = ConvGeometry.make(512, 512, 1), torch.empty(2, 512, pixels, pixels)  # at 11 px 2.1 times
            experts = torch.empty(1, *geometry.weight_shape)
            assert choose(x, experts, scales, geometry) == expected
            assert choose(x, experts, Mixture(), geometry) == "static"

    def test_what_it_leaves_to_torch(self) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        x, experts = torch.randn(2, 8, 9, 9), torch.randn(2, 16, 8, 3, 3)
        assert taken(x, experts, geometry)
        assert not taken(x.double(), experts.double(), geometry)
        assert not taken(x.to(torch.bfloat16), experts, geometry)
        assert not taken(x.to("meta"), experts.to("meta"), geometry)
        assert not supports(x, torch.randn(2, 16, 8, 17, 17), geometry)
        for batch, side in ((1, 9), (2, 9), (2, 40)):  # 1x1 on maps of any size
            image, weights = torch.randn(batch, 256, side, side), torch.randn(2, 160, 256, 1, 1)
            assert taken(image, weights, ConvGeometry.make(256, 160, 1))
        for filters, stride, wanted in ((8, 1, True), (8, 2, False), (16, 1, False)):  # one weight for each output
            layer = ConvGeometry.make(8, filters, 1, stride, groups=8)
            assert taken(x, torch.randn(2, filters, 1, 1, 1), layer) == wanted
        assert taken(x, torch.randn(2, 16, 2, 1, 1), ConvGeometry.make(8, 16, 1, groups=4))
        with kernels(on=False):
            assert not taken(x, experts, geometry)

    def test_narrow_groups_are_left_to_torch(self) -> None:
        """torch convolves groups of 8 channels faster, and of 4 where nothing is recorded; small maps stay here."""
        eight, four = ConvGeometry.make(256, 256, 3, 1, 1, groups=32), ConvGeometry.make(256, 256, 3, 1, 1, groups=64)
        mixture = Mixture(torch.rand(2, 2))
        for geometry, side, recorded, wanted in (
            (eight, 28, True, "grouped"),
            (eight, 28, False, "grouped"),
            (eight, 7, True, "blockwise"),
            (four, 56, True, "blockwise"),
            (four, 56, False, "grouped"),
        ):
            x, experts = torch.randn(2, 256, side, side), torch.randn(2, *geometry.weight_shape)
            with torch.set_grad_enabled(recorded):
                assert choose(x, experts, mixture, geometry) == wanted
                assert taken(x, experts, geometry) == (wanted == "blockwise")

    def test_the_dispatcher_is_passed_by_when_nothing_is_recorded(self) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        x, experts, mixture = torch.randn(1, 8, 9, 9), torch.randn(2, 16, 8, 3, 3), Mixture(torch.rand(1, 2))
        assert fast_convolve("auto", x, experts, mixture, geometry) is None
        with torch.no_grad():
            assert fast_convolve("auto", x, experts, mixture, geometry) is not None
            assert fast_convolve("auto", x[:0], experts, Mixture(mixture.gate[:0]), geometry) is None
            assert fast_convolve("auto", x, experts[:1], Mixture(), geometry) is None

            class Wrapped(torch.Tensor):
                pass

            wrapped = Mixture(mixture.gate.as_subclass(Wrapped))
            assert fast_convolve("auto", x, experts, wrapped, geometry) is None
            scale = Mixture(in_scale=torch.rand(1, 8))
            assert fast_convolve("auto", x, experts[:1], scale, geometry) is not None
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert fast_convolve("auto", x, experts, mixture, geometry) is None
                assert conditional_conv2d(x, experts, None, mixture, geometry).dtype == torch.bfloat16

    @pytest.mark.parametrize("kernel", [3, 5])
    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_depthwise_rows_of_every_length(self, kernel: int, stride: int) -> None:
        geometry = ConvGeometry.make(2, 2, kernel, stride, kernel // 2, groups=2)
        torch.manual_seed(0)
        for width in range(1, 36):
            x, experts = torch.randn(2, 2, 5, width, requires_grad=True), torch.randn(1, 2, 1, kernel, kernel)
            leaves = [x, experts.requires_grad_()]
            mixture = Mixture(out_scale=torch.ones(2, 2))
            expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
            actual = values_and_gradients(by_blocks(x, experts, None, mixture, geometry), leaves)
            for a, e in zip(actual, expected, strict=True):
                assert (a - e).abs().max() <= 2e-5 * max(1.0, e.abs().max().item())

    @pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 1), (5, 2), (7, 3)])
    def test_depthwise_maps_of_every_height(self, kernel: int, stride: int) -> None:
        """Rows are computed up to eight at a time; a row of 7, 9, 14 or 16 takes one or two vectors."""
        geometry = ConvGeometry.make(2, 2, kernel, stride, kernel // 2, groups=2)
        torch.manual_seed(0)
        for height in range(1, 28):
            x = torch.randn(2, 2, height, (7, 9, 14, 16)[height % 4], requires_grad=True)
            experts = torch.randn(1, 2, 1, kernel, kernel, requires_grad=True)
            assert_equals_the_loop(x, experts, Mixture(out_scale=torch.ones(2, 2)), geometry, [x, experts])

    @pytest.mark.parametrize("stride", [1, 2])
    def test_what_is_no_number_stays_where_it_is(self, stride: int) -> None:
        """Not in the other maps, nor in the rows next to it."""
        for groups in (1, 4):
            geometry = ConvGeometry.make(4, 4, 3, stride, 1, groups=groups)
            x, experts = torch.randn(3, 4, 7, 7), torch.randn(2, *geometry.weight_shape)
            x[1, 2, 3, 6] = torch.nan
            mixture = Mixture(torch.rand(3, 2))
            leaves = [x.requires_grad_(), experts.requires_grad_()]
            expected = per_sample_loop(x, experts, None, mixture, geometry)
            with torch.no_grad():
                actual = conditional_conv2d(x, experts, None, mixture, geometry)
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
            if groups == 1:
                continue
            expected = values_and_gradients(expected, leaves)[2]
            actual = values_and_gradients(by_blocks(x, experts, None, mixture, geometry), leaves)[2]
            assert expected.isfinite()[:, 2, 0, :, 0].all()  # the left taps, which never meet the last column
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("layer", [CondConv2d(8, 16, 3, variant=CondConv(experts=2)), ODConv2d(8, 16, 3)])
    def test_a_compiled_layer_and_autocast(self, layer: torch.nn.Module) -> None:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x = torch.randn(3, 8, 9, 9)
        expected = layer.eval()(x)
        torch._dynamo.reset()
        compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled_layer(x), expected, rtol=1e-4, atol=1e-4)
        expected.square().sum().backward()
        grads = [p.grad for p in layer.parameters()]
        layer.zero_grad(set_to_none=True)
        compiled_layer(x).square().sum().backward()
        for parameter, grad in zip(layer.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), expected, rtol=5e-2, atol=0.5)

    def test_what_torch_refuses_is_refused(self) -> None:
        geometry = ConvGeometry.make(1, 4, 3)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"they must have \[2, 4, 4, 3, 3\]"):
            conditional_conv2d(
                torch.randn(3, 4, 9, 9), torch.randn(2, 4, 1, 3, 3), None, Mixture(torch.rand(3, 2)), geometry
            )
        layer = CondConv2d(8, 16, 3, stride=2, variant=CondConv(experts=2))
        for recording in (True, False):
            with torch.set_grad_enabled(recording), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
                layer(torch.randn(4, 8, 2, 2))
        with torch.no_grad():
            for gate in (torch.rand(2, 2), torch.rand(4, 3)):
                with pytest.raises(RuntimeError, match=r"the gate has the sizes \[., .\], it must have \[4, 2\]"):
                    layer(torch.randn(4, 8, 9, 9), Mixture(gate))
            meta = torch.randn(2, 16, 8, 3, 3, device="meta")
            assert not taken(torch.randn(4, 8, 9, 9), meta, layer.geometry)

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # forward derivatives of torch script their rules
    def test_nothing_is_hidden_from_who_looks_on(self) -> None:
        """Counters, tracers, transforms and forward derivatives see the operators, not a call that they cannot see."""
        layer, x = CondConv2d(8, 16, 3, variant=CondConv(experts=2)).eval(), torch.randn(1, 8, 9, 9)
        torch.nn.init.normal_(layer.router.linear.weight)  # type: ignore[union-attr]
        with torch.no_grad():
            expected = layer(x)
            with FlopCounterMode(display=False) as counter:
                layer(x)
            assert counter.get_total_flops() >= 2 * 16 * 8 * 9 * 49
            torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], expected, rtol=1e-4, atol=1e-5)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                assert forward_ad.unpack_dual(layer(dual)).tangent is not None
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(layer, (x,))
            torch.testing.assert_close(traced(2 * x), layer(2 * x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_gradients_have_the_dtype_and_strides_of_what_they_are_of(self, dtype: torch.dtype) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        x, experts, _, _ = make_case(geometry, MIXTURES["gate"], 3, False, torch.float32)
        experts = experts.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
        gate = torch.rand(experts.shape[0], 3, dtype=dtype).t().requires_grad_()
        leaves = [x, experts, gate]
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        expected = values_and_gradients(per_sample_loop(x, experts, None, Mixture(gate.float()), geometry), leaves)
        actual = values_and_gradients(by_blocks(x, experts, None, Mixture(gate), geometry), leaves)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype
            assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item())
        shape = ([1, 1], [1, 1], [1, 1], 1, False)
        torch.library.opcheck(
            blockwise.OPERATOR, (x, experts, gate, None, None, None, *shape), test_utils="test_faketensor"
        )
        arguments = (torch.randn(3, 16, 11, 10), x.new_empty(0), x, experts, gate, None, None, None, *shape[:4])
        for needs in ([True] * 3 + [False] * 3, [True] + [False] * 5, [False, True] + [False] * 4):
            given = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in (*arguments, needs))
            torch.library.opcheck(blockwise._backward, given, test_utils="test_faketensor")

    def test_a_layer_whose_experts_are_contiguous_in_another_way(self) -> None:
        weight = torch.randn(2, 16, 8, 1, 3).transpose(3, 4)  # contiguous, with a stride of 3 in dimension 4
        x, gate = torch.randn(3, 8, 9, 9), torch.rand(3, 2)
        geometry = ConvGeometry.make(8, 16, (3, 1))
        with torch.no_grad():
            expected = per_sample_loop(x, weight, None, Mixture(gate), geometry)
            actual = by_blocks(x, weight, None, Mixture(gate), geometry)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_a_compiled_program_of_inductor(self) -> None:
        layer, x = CondConv2d(8, 16, 3, variant=CondConv(experts=2)), torch.randn(3, 8, 9, 9)
        torch.nn.init.normal_(layer.router.linear.weight)  # type: ignore[union-attr]
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        torch._dynamo.reset()
        actual = torch.autograd.grad(torch.compile(layer)(x).square().sum(), list(layer.parameters()))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)

    def test_an_empty_batch(self) -> None:
        layer = CondConv2d(8, 16, 3, padding=1, variant=CondConv(experts=2))
        assert layer(torch.empty(0, 8, 9, 9)).shape == (0, 16, 9, 9)
        with torch.no_grad():
            assert layer(torch.empty(0, 8, 9, 9)).shape == (0, 16, 9, 9)
