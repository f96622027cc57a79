"""The kernels for GPUs are the same function as the per-sample loop, in values and in gradients.

Without a GPU Triton's interpreter runs them, number by number, in float32 and float16; it cannot multiply bfloat16.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConvGeometry, Mixture, conditional_layers, conditional_like
from condconv_surgery.ops.backends.triton import availability, launch
from condconv_surgery.ops.backends.triton import triton_convolution as convolution
from condconv_surgery.ops.backends.triton.fast_path import mixed_kernel
from condconv_surgery.ops.backends.triton.triton_convolution import supports
from condconv_surgery.ops.backends.triton.triton_routing import pool
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.ops.geometry import ConvArguments
from condconv_surgery.ops.per_sample.per_sample_conv import format_of
from condconv_surgery.recipe import CondConv, ODConv, Variant
from tests.geometries import GEOMETRIES, without_bias
from tests.ops.test_implementations import MIXTURES, compare_compiled, make_case, values_and_gradients
from tests.reference import per_sample_loop
from tests.variant_cases import scramble

ROOT = Path(__file__).parents[2]
LEAST_SHARED = 99 << 10  # bytes that a program may have on the smallest GPUs, compute capabilities 8.6 and 8.9
TF32 = 2e-3  # of the largest value: eleven bits, twice
MORE = {
    "one channel": dict(in_channels=1, out_channels=3, kernel_size=3, padding=1),
    "one filter": dict(in_channels=3, out_channels=1, kernel_size=3, stride=2),
    "pixels that no tap reaches": dict(in_channels=5, out_channels=9, kernel_size=2, stride=3),
    "3x2": dict(in_channels=17, out_channels=20, kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
}
CASES = [
    ("3x3", "gate"),
    ("stride", "everything"),
    ("dilation", "gate and scales"),
    ("1x1", "gate"),
    ("1x1 strided", "everything"),
    ("1x1 padded", "scales"),
    ("depthwise", "gate"),
    ("depthwise strided", "everything"),
    ("1x1 depthwise", "gate and scales"),
    ("reflect", "spatial"),
    ("same even", "gate"),
    *((name, "everything") for name in MORE),
]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device here")
uneven = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


def compare(
    name: str,
    parts: str,
    dtype: torch.dtype,
    tolerance: float,
    last: bool = False,
    watched: bool = False,
    batch: int = 2,
):
    geometry = ConvGeometry.make(**without_bias({**GEOMETRIES, **MORE}[name]))
    x, experts, _, mixture = make_case(geometry, MIXTURES[parts], batch, False, torch.float32)
    leaves = [t for t in (x, experts, *mixture) if t is not None]
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
    x = x.detach().to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    assert supports(geometry.pad(x)[0], experts, mixture, geometry)
    leaves[0] = x
    if watched:
        with FlopCounterMode(display=False):
            y = conditional_conv2d(x, experts, None, mixture, geometry, "blockwise")
    else:
        y = conditional_conv2d(x, experts, None, mixture, geometry, "blockwise")
    assert y.dtype == dtype
    actual = values_and_gradients(y, leaves)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item()), number


@uneven
@pytest.mark.parametrize(("name", "parts"), CASES)
def test_interpreted_kernels_equal_the_loop(name: str, parts: str, interpreted: None) -> None:
    compare(name, parts, torch.float32, TF32, last=name == "stride")


@pytest.mark.parametrize("name", ["1x1", "1x1 strided", "1x1 padded", "depthwise"])
def test_what_needs_no_tensor_cores_is_exact(name: str, interpreted: None) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compare(name, "everything", torch.float32, 2e-5)


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
def test_the_operator_and_half_precision(name: str, interpreted: None) -> None:
    compare(name, "everything", torch.float32, TF32, watched=True)
    compare(name, "everything", torch.float16, 2e-2, last=True)


def test_one_compiled_graph_serves_every_batch(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    monkeypatch.setattr(availability, "is_here", torch.compiler.assume_constant_result(lambda device: True))
    layer = conditional_like(nn.Conv2d(3, 4, 3, padding=1), ODConv(experts=2))
    compare_compiled(layer, [torch.randn(batch, 3, 5, 7) for batch in (2, 3, 5)], TF32)


def test_a_second_derivative(interpreted: None) -> None:
    layer = conditional_like(nn.Conv2d(3, 4, 3), CondConv(experts=2))
    scramble(layer)
    x, found = torch.randn(2, 3, 5, 5, requires_grad=True), []
    for implementation in ("auto", "loop"):
        layer.implementation = implementation
        layer.zero_grad()
        (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
        assert layer.weight.grad is not None
        found.append(layer.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=TF32, atol=TF32 * float(found[1].abs().max()))


@pytest.mark.parametrize(
    ("part", "shape"),
    [("gate", (1, 2)), ("gate", (3, 1)), ("in_scale", (3, 1)), ("out_scale", (2, 4)), ("spatial", (3, 1, 3))],
)
def test_a_mixture_for_other_samples_is_refused(part: str, shape: tuple[int, ...], interpreted: None) -> None:
    mixture = Mixture(gate=torch.ones(3, 2))._replace(**{part: torch.ones(shape)})
    x, experts, geometry = torch.ones(3, 3, 5, 5), torch.ones(2, 4, 3, 3, 3), ConvGeometry.make(3, 4, 3)
    with pytest.raises(InputError, match=rf"The {part} of a mixture has the shape"):
        conditional_conv2d(x, experts, None, mixture, geometry, "blockwise")


def test_a_picture_smaller_than_the_kernel_is_refused(interpreted: None) -> None:
    layer = conditional_like(nn.Conv2d(3, 4, 3), CondConv(experts=2))
    with pytest.raises(InputError, match="An image of 2x5 and a kernel of 3x3"):
        layer(torch.ones(2, 3, 2, 5))


def test_float16_keeps_the_range_of_gradients(interpreted: None) -> None:
    """All scales are 2: in float16 the gradient of the experts would leave its range on the way."""
    x, experts = torch.ones(3, 3, 5, 5, dtype=torch.float16), torch.ones(2, 4, 3, 3, 3, requires_grad=True)
    full = Mixture(*(2 * torch.ones(shape) for shape in ((3, 2), (3, 3, 3), (3, 3), (3, 4))))
    y = conditional_conv2d(x, experts, None, full, ConvGeometry.make(3, 4, 3), "blockwise")
    (grad,) = torch.autograd.grad(y, experts, torch.full_like(y, 1000.0))
    torch.testing.assert_close(grad, torch.full_like(grad, 3 * 9 * 1000.0 * 2**4))


def test_checkpoints_may_mix_both_ways(interpreted: None) -> None:
    layer = conditional_like(nn.Conv2d(3, 4, 3), CondConv(experts=2))
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with FlopCounterMode(display=False):
        y = checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None


def test_a_batch_is_split_where_its_kernels_are_too_many(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "MAX_DEVICE_BYTES", 2 * 9 * 5 * 4 * 4)  # two samples and one
    compare("pixels that no tap reaches", "everything", torch.float32, TF32, batch=3)


@pytest.mark.parametrize("variant", [CondConv(experts=3), ODConv(experts=3)], ids=str)
def test_a_layer_is_the_same_with_and_without(variant: Variant, interpreted: None, monkeypatch) -> None:
    layer = conditional_like(nn.Conv2d(6, 10, 3, padding=1, bias=True), variant).eval()
    scramble(layer)
    x = torch.randn(3, 6, 5, 7, requires_grad=True)

    def values() -> list[torch.Tensor]:
        y = layer(x)
        with torch.no_grad():  # routers and kernels of one too
            alone = layer(x), layer(x[:1].to(memory_format=torch.channels_last))
        return [y, *alone, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    found = values()
    monkeypatch.setattr(availability, "is_here", lambda device: False)
    for a, e in zip(found, values(), strict=True):
        assert (a - e).abs().max() <= TF32 * max(1.0, e.abs().max().item())
    # it was computed in another way
    assert not any(torch.equal(a, b) for a, b in zip(found[:3], values()[:3], strict=True))


@uneven
@pytest.mark.parametrize(("name", "parts"), CASES)
def test_the_kernel_of_one_is_mixed_in_its_layout(name: str, parts: str, interpreted: None) -> None:
    geometry = ConvGeometry.make(**without_bias({**GEOMETRIES, **MORE}[name]))
    x, experts, _, mixture = make_case(geometry, MIXTURES[parts], 1, False, torch.float32)
    with torch.no_grad():
        expected = per_sample_loop(x, experts, None, mixture, geometry)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.to(memory_format=layout)
            kernel = mixed_kernel(given, experts, mixture, geometry)
            dense = geometry.groups == 1 and not geometry.pointwise
            assert (kernel is None) == (dense and format_of(given) == torch.contiguous_format)
            assert kernel is None or kernel.shape == geometry.weight_shape
            y = conditional_conv2d(given, experts, None, mixture, geometry, "plain")
            assert (y - expected).abs().max() <= TF32 * max(1.0, expected.abs().max().item())
            padded, arguments = geometry.pad(given)
            assert y.stride() == F.conv2d(padded, experts[0], None, *arguments).stride()
    assert mixed_kernel(x, experts, mixture, geometry) is None  # recorded


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(3, 5), (40, 30)])
def test_pooling_is_the_mean(size: tuple[int, int], last: bool, interpreted: None) -> None:
    x = torch.randn(3, 5, *size).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    x.requires_grad_()
    pooled = pool(x)
    assert pooled is not None
    direction = torch.randn(3, 5)
    expected = x.mean(dim=(2, 3))
    torch.testing.assert_close(pooled, expected)
    found, wanted = (torch.autograd.grad(y, x, direction)[0] for y in (pooled, expected))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(pool(x[:, ::2, 1:].detach()), x.detach()[:, ::2, 1:].mean(dim=(2, 3)))


def test_what_triton_does_not_take(interpreted: None) -> None:
    def fits(mixture: Mixture, dtype: torch.dtype = torch.float32, **arguments: object) -> bool:
        geometry = ConvGeometry.make(**arguments)
        x = torch.empty(2, geometry.in_channels, 9, 9, dtype=dtype)
        experts = torch.empty(2, *geometry.weight_shape)
        return supports(x, experts, mixture, geometry)

    gated = Mixture(gate=torch.ones(2, 2))
    dense = dict(in_channels=8, out_channels=8, kernel_size=3)
    assert fits(gated, **dense)
    assert not fits(Mixture(), **dense)  # nothing to mix
    assert not fits(gated, torch.float64, **dense)
    assert not fits(gated, **dense, groups=2)
    plain = ConvArguments((1, 1), (0, 0), (1, 1), 1)
    many = torch.empty(33, 8, 8, 3, 3, device="meta")
    assert not supports(torch.empty(2, 8, 9, 9, device="meta"), many, gated, plain)
    far = torch.empty(8, 1, 1, 1, device="meta").expand(-1, 8, 1 << 15, 1 << 15).contiguous()
    assert not supports(far, many[:2], gated, plain)
    assert not fits(gated, **dense, stride=2, dilation=2)  # the gradient of its input has no phases
    assert fits(gated, **{**dense, "kernel_size": 1}, stride=2, dilation=2)
    assert not fits(gated, **{**dense, "kernel_size": 9}, groups=8)  # 81 taps of a depthwise layer at a time
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert not fits(gated, **dense)  # float32 that is asked to be exact
        assert fits(gated, torch.bfloat16, **dense)


class OpaqueKernel:
    """What a version of Triton may return that has no compiled kernel to launch again."""


@pytest.mark.parametrize(("compiled", "launches"), [(OpaqueKernel(), 2), (None, 2), ({(1, 1, 1): lambda *_: None}, 1)])
def test_a_triton_without_compiled_kernels_launches_by_itself(
    compiled: object, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kernel = {(1, 1, 1): lambda *tensors, **constants: calls.append(constants) or compiled}
    monkeypatch.setattr(launch, "_compiled", {})
    for _ in range(2):
        launch.launch(kernel, (1, 1, 1), (torch.ones(1),), (1.0,), {})
    assert len(calls) == launches


def test_precision_of_a_torch_without_settings_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(enabled=True, allow_tf32=False)
    monkeypatch.setattr(torch.backends, "cudnn", older)
    assert not convolution._is_tf32_allowed()
    older.allow_tf32 = True
    assert convolution._is_tf32_allowed()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90])
def test_kernels_compile_and_known_launches_are_tritons_own(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_launches", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    found = json.loads(done.stdout)
    assert len(found) == 36
    for name, record in found.items():
        assert record["alike"], name
        assert record["known"] == 1, name
        assert bool(record["tensor cores"]) == (capability == 90 and name.startswith("dense")), name
        assert record["shared"] <= LEAST_SHARED, name


@uneven
@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "parts"), CASES)
def test_compiled_kernels_equal_the_loop(name: str, parts: str, dtype: torch.dtype, last: bool) -> None:
    geometry = ConvGeometry.make(**without_bias({**GEOMETRIES, **MORE}[name]))
    x, experts, _, mixture = make_case(geometry, MIXTURES[parts], 40, False, torch.float32)
    leaves = [t for t in (x, experts, *mixture) if t is not None]
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
    layout = torch.channels_last if last else torch.contiguous_format
    moved = [t.detach().to("cuda", dtype if t is x else None).requires_grad_() for t in leaves]
    moved[0] = moved[0].detach().to(memory_format=layout).requires_grad_()
    present = iter(moved[2:])
    mixture = Mixture(*(None if part is None else next(present) for part in mixture))
    assert supports(geometry.pad(moved[0])[0], moved[1], mixture, geometry)

    def actual() -> list[torch.Tensor]:
        y = conditional_conv2d(moved[0], moved[1], None, mixture, geometry, "blockwise")
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout)
        direction = torch.linspace(-1, 1, y.numel()).view(y.shape).to("cuda", dtype)
        return [y, *torch.autograd.grad(y, moved, direction)]

    first = actual()
    tolerance = TF32 if dtype == torch.float32 else 3e-2 if dtype == torch.bfloat16 else 5e-3
    for number, (a, e) in enumerate(zip(first, expected, strict=True)):
        difference = (a.float().cpu() - e).norm() / e.norm().clamp(min=1e-3)
        assert difference <= tolerance, (number, difference)
    assert all(torch.equal(a, b) for a, b in zip(first, actual(), strict=True))  # no bit depends on who is first


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("variant", [CondConv(experts=4), ODConv(experts=4), ODConv(experts=1)], ids=str)
def test_a_model_on_a_gpu_is_the_model_on_the_cpu(variant: Variant) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1, groups=32), nn.Conv2d(32, 8, 1)]
    model = nn.Sequential(*(conditional_like(p, variant) if isinstance(p, nn.Conv2d) else p for p in parts)).eval()
    scramble(model)
    x = torch.randn(8, 16, 14, 14)
    expected = model(x)
    expected.square().sum().backward()
    moved = copy.deepcopy(model).cuda().to(memory_format=torch.channels_last)
    moved.zero_grad()
    assert all(layer.weight.is_contiguous() for layer in conditional_layers(moved).values())
    with torch.autocast("cuda", torch.bfloat16):
        y = moved(x.cuda().to(memory_format=torch.channels_last))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert (y.float().cpu() - expected).norm() <= 0.02 * expected.norm()
    for (name, found), wanted in zip(moved.named_parameters(), model.parameters(), strict=True):
        assert found.grad is not None
        assert (found.grad.cpu() - wanted.grad).norm() <= 0.1 * wanted.grad.norm() + 1e-4, name


@cuda
@pytest.mark.cuda
def test_a_compiled_model_on_a_gpu_has_no_graph_break() -> None:
    layer = conditional_like(nn.Conv2d(16, 16, 3, padding=1), CondConv(experts=4)).cuda().eval()
    scramble(layer)
    torch._dynamo.reset()  # its limit of recompilations counts the layers of other tests
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 8):
        x = torch.randn(batch, 16, 14, 10, device="cuda")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-3, atol=1e-3)
