"""The compiled kernels are the same function as the per-sample loop, in values and in gradients."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from condconv_surgery.cli import main as command_line
from typer.testing import CliRunner

from condconv_surgery.errors import InputError
from condconv_surgery.layers import CondConv2d, ConvGeometry, Mixture, ODConv2d, native
from condconv_surgery.layers.choice import choose
from condconv_surgery.layers.execution import execute
from condconv_surgery.recipe import CondConv
from tests.geometries import GEOMETRIES, without_bias
from tests.reference import per_sample_loop
from tests.test_layers_execution import MIXTURES, make_case, values_and_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # the reference loop

slow_to_build = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="no AVX2"),
]
MORE = {
    "pixels that no tap reaches": dict(in_channels=5, out_channels=9, kernel_size=2, stride=3),
    "stride 2, dilation 2": dict(in_channels=5, out_channels=9, kernel_size=3, stride=2, padding=1, dilation=2),
    "uneven everything": dict(
        in_channels=5, out_channels=17, kernel_size=(3, 5), stride=(2, 1), padding=(2, 1), dilation=(1, 2)
    ),
    "several panels and chunks": dict(in_channels=70, out_channels=50, kernel_size=3, padding=1),
    "whole panels": dict(in_channels=64, out_channels=32, kernel_size=3, padding=1),
    "more padding than kernel": dict(in_channels=4, out_channels=16, kernel_size=1, padding=2),
    "large kernel": dict(in_channels=3, out_channels=16, kernel_size=9, padding=4),
}


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    native.enable()
    yield
    native.disable()


def taken(x: torch.Tensor, experts: torch.Tensor, geometry: ConvGeometry) -> bool:
    return native.fits(x, experts, geometry.stride, geometry.groups)


@pytest.mark.usefixtures("compiled")
class TestCompiled:
    pytestmark = slow_to_build

    @pytest.mark.parametrize("parts", MIXTURES)
    @pytest.mark.parametrize("name", [*GEOMETRIES, *MORE])
    def test_equals_the_loop(self, name: str, parts: str) -> None:
        arguments = {**GEOMETRIES, **MORE}[name]
        geometry = ConvGeometry.make(**without_bias(arguments))
        for batch in (1, 2, 7):
            x, experts, bias, mixture = make_case(geometry, MIXTURES[parts], batch, False, torch.float32)
            if not taken(x, experts, geometry):
                assert geometry.groups > 1 or geometry.pointwise
                return
            leaves = [t for t in (x, experts, *mixture) if t is not None]
            expected = values_and_gradients(per_sample_loop(x, experts, bias, mixture, geometry), leaves)
            actual = values_and_gradients(execute(x, experts, bias, mixture, geometry, "blocks"), leaves)
            with torch.no_grad():
                assert torch.equal(execute(x, experts, bias, mixture, geometry, "blocks"), actual[0])
            for a, e in zip(actual, expected, strict=True):
                assert (a - e).abs().max() <= 2e-5 * max(1.0, e.abs().max().item())

    @pytest.mark.parametrize("name", ["3x3", "whole panels", "several panels and chunks"])
    def test_every_count_of_experts(self, name: str) -> None:
        geometry = ConvGeometry.make(**without_bias({**GEOMETRIES, **MORE}[name]))
        torch.manual_seed(0)
        for experts, batch in itertools.product((1, 2, 3, 4, 8, 9), (1, 5, 12)):
            x, gate = torch.randn(batch, geometry.in_channels, 6, 7), torch.rand(batch, experts, requires_grad=True)
            weight = torch.randn(experts, *geometry.weight_shape, requires_grad=True)
            leaves = [weight, gate]
            expected = values_and_gradients(per_sample_loop(x, weight, None, Mixture(gate), geometry), leaves)
            actual = values_and_gradients(execute(x, weight, None, Mixture(gate), geometry, "blocks"), leaves)
            for a, e in zip(actual, expected, strict=True):
                assert (a - e).abs().max() <= 2e-5 * max(1.0, e.abs().max().item())

    def test_a_batch_whose_padded_input_is_cut(self) -> None:
        """More than the 16 MiB that are padded at a time, so that gradients add up over several parts."""
        geometry = ConvGeometry.make(32, 20, 3, 1, 1)
        x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 3, False, torch.float32)
        x = torch.randn(3, 32, 256, 256, requires_grad=True)
        leaves = [x, *(t for t in (experts, *mixture) if t is not None)]
        expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), leaves)
        actual = values_and_gradients(execute(x, experts, None, mixture, geometry, "blocks"), leaves)
        for a, e in zip(actual, expected, strict=True):
            assert (a - e).abs().max() <= 1e-4 * max(1.0, e.abs().max().item())

    def test_threads_change_no_bit(self) -> None:
        geometry = ConvGeometry.make(40, 24, 3, 2, 1)
        x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 5, False, torch.float32)
        leaves = [t for t in (x, experts, *mixture) if t is not None]
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(values_and_gradients(execute(x, experts, None, mixture, geometry, "blocks"), leaves))
        finally:
            torch.set_num_threads(before)
        for one, other in itertools.pairwise(found):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_only_what_is_asked_for(self) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 3, False, torch.float32)
        execute(x.detach(), experts.detach(), None, mixture, geometry, "blocks").sum().backward()
        assert x.grad is None
        assert experts.grad is None
        assert all(part is not None and part.grad is not None for part in mixture)
        execute(x, experts.detach(), None, Mixture(*(p.detach() for p in mixture)), geometry, "blocks").sum().backward()
        assert x.grad is not None

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
        actual = values_and_gradients(execute(x, experts, None, mixture, geometry, "blocks"), leaves)
        for a, e in zip(actual, expected, strict=True):
            assert (a - e).abs().max() <= 1e-4

    def test_what_it_leaves_to_torch(self) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        x, experts = torch.randn(2, 8, 9, 9), torch.randn(2, 16, 8, 3, 3)
        assert taken(x, experts, geometry)
        assert not taken(x.double(), experts.double(), geometry)
        assert not taken(x.to(torch.bfloat16), experts, geometry)
        assert not taken(x.to(memory_format=torch.channels_last), experts, geometry)
        assert not taken(x.to("meta"), experts.to("meta"), geometry)
        assert not native.fits(x, torch.randn(2, 16, 8, 17, 17), (1, 1), 1)
        pointwise = ConvGeometry.make(8, 16, 1)
        assert taken(x, torch.randn(2, 16, 8, 1, 1), pointwise)
        assert not taken(torch.randn(2, 8, 15, 15), torch.randn(2, 16, 8, 1, 1), pointwise)
        assert taken(torch.randn(1, 8, 15, 15), torch.randn(2, 16, 8, 1, 1), pointwise)
        native.disable()
        try:
            assert not taken(x, experts, geometry)
        finally:
            native.enable()

    def test_a_batch_of_one_is_convolved_by_it_when_nothing_is_recorded(self) -> None:
        geometry = ConvGeometry.make(8, 16, 3, 1, 1)
        x, experts, mixture = torch.randn(1, 8, 9, 9), torch.randn(2, 16, 8, 3, 3), Mixture(torch.rand(1, 2))
        assert choose(x, experts, mixture, geometry) == "plain"
        with torch.no_grad():
            assert choose(x, experts, mixture, geometry) == "blocks"

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

    def test_an_empty_batch(self) -> None:
        layer = CondConv2d(8, 16, 3, padding=1, variant=CondConv(experts=2))
        assert layer(torch.empty(0, 8, 9, 9)).shape == (0, 16, 9, 9)
        with torch.no_grad():
            assert layer(torch.empty(0, 8, 9, 9)).shape == (0, 16, 9, 9)

    def test_ninja_of_the_environment_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("ninja")
        folders = [Path(p) for p in os.environ["PATH"].split(os.pathsep)]
        without = os.pathsep.join(str(p) for p in folders if not (p / "ninja").exists())
        monkeypatch.setenv("PATH", without)
        with native._ninja_found():
            assert shutil.which("ninja") is not None
        assert os.environ["PATH"] == without


def test_a_compiler_that_fails_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setattr(native, "_compiled", None)
    with pytest.raises(InputError, match=r"Ninja is required(.|\n)*g\+\+ 12(.|\n)*condconv-surgery\[native\]"):
        native.enable()
    assert not native.is_enabled()


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(InputError, match=r"torch says DEFAULT(.|\n)*AVX2"):
        native.enable()


def test_the_lock_of_a_killed_build_is_taken_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = native._build_folder() / "lock"
    lock.touch()
    assert (native._build_folder() / "lock").exists()  # another process is building
    long_ago = time.time() - native.LONGEST_BUILD - 1
    os.utime(lock, (long_ago, long_ago))
    native._build_folder()
    assert not lock.exists()


@pytest.mark.parametrize(("arguments", "environment"), [(["--native"], {}), ([], {"CONDCONV_NATIVE": "1"}), ([], {})])
def test_the_command_line_turns_it_on(
    arguments: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(native, "enable", lambda: called.append(True))
    result = CliRunner().invoke(command_line.app, [*arguments, "convert", "no-such-file.pt"], env=environment)
    assert result.exit_code != 0
    assert called == ([True] if arguments or environment else [])
