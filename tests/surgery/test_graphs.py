"""A graph as the model: converted as a graph, with its functional convolutions, among other passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp
from torchvision.models.feature_extraction import create_feature_extractor

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import CondConv2d, ConditionalConv2d, conditional_layers
from condconv_surgery.surgery import lift_convolutions


class Functional(nn.Module):
    """A module's convolution and three functional ones, of which two share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3) / 6)
        self.bias = nn.Parameter(torch.randn(8))
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(8, 8, 1, 1) / 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.conv2d(x, self.weight, self.bias, stride=2, padding=1, groups=2).relu()
        x = F.conv2d(x, self.inner.weight).relu() + x
        x = F.conv2d(x, self.inner.weight)
        return self.head(x.mean((2, 3)))


class Stays(nn.Module):
    """Functional convolutions that have to stay, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.used = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.two_strides = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.scaled = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.of_body = nn.Conv2d(4, 4, 1)
        self.register_buffer("blur", torch.ones(4, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.body(x))
        x = F.conv2d(x, self.used) * self.used.mean()
        x = F.conv2d(F.conv2d(x, self.two_strides), self.two_strides, stride=2)
        x = F.conv2d(x, self.scaled * 2)
        x = F.conv2d(self.of_body(x), self.of_body.weight)
        return F.conv2d(x, self.blur, groups=4)


REASONS = {
    "used": "is used elsewhere too",
    "two_strides": "its calls differ",
    "conv2d_3": "its weight is computed",
    "of_body.weight": "is used elsewhere too",
    "blur": "blur is not a parameter",
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Functional())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_graph_stays_a_graph_and_loses_its_functional_convolutions(
    graph: fx.GraphModule, x: Tensor, inplace: bool
) -> None:
    expected, names, trained = graph.eval()(x), set(graph.state_dict()), graph.weight
    conversion = cs.convert(graph, cs.CondConv(experts=3), example=x, inplace=inplace)
    model = conversion.model
    assert isinstance(model, fx.GraphModule)
    assert (model is graph) is inplace
    assert set(conditional_layers(model)) == {"weight_conv", "inner"}
    assert [site.calls for site in conversion.plan.to_convert] == [1, 2]
    torch.testing.assert_close(model.eval()(x), expected)
    assert not any(node.op == "get_attr" or node.target is torch.conv2d for node in model.graph.nodes)
    assert {"weight", "bias", "inner.weight"} & set(dict(model.named_parameters())) == {"inner.weight"}
    if not inplace:
        assert set(graph.state_dict()) == names
        assert graph.weight is trained
        assert torch.equal(graph(x), expected)


def test_lifting_keeps_parameters_meta_and_function(graph: fx.GraphModule, x: Tensor) -> None:
    ShapeProp(graph).propagate(x)
    expected, weight = graph.eval()(x), graph.weight
    weight.requires_grad_(False)
    assert lift_convolutions(graph) == ()
    assert torch.equal(graph(x), expected)
    assert graph.weight_conv.weight is weight
    assert not graph.weight_conv.weight.requires_grad
    (node,) = [node for node in graph.graph.nodes if node.target == "weight_conv"]
    assert node.meta["tensor_meta"].shape == (2, 8, 6, 6)
    assert lift_convolutions(graph) == ()  # nothing is left to do


def test_what_stays_says_why() -> None:
    x = torch.randn(2, 4, 9, 9)
    model = fx.symbolic_trace(Stays())
    conversion = cs.convert(model, cs.CondConv(), example=x, skip_stem=False)
    assert [site.name for site in conversion.plan.to_convert] == ["body"]
    skipped = {skip.name: skip.reason for skip in conversion.plan.skipped}
    assert len(skipped) == len(conversion.plan.skipped)  # each once
    for name, reason in REASONS.items():
        assert reason in skipped[name]
    torch.testing.assert_close(conversion.model.eval()(x), model.eval()(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_graph_with_nothing_to_lift_is_refused_in_words(inplace: bool) -> None:
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.used) * self.used.mean()

    with pytest.raises(
        InputError, match=r"No convolution to convert: F\.conv2d in the graph: used is used elsewhere too"
    ):
        cs.convert(fx.symbolic_trace(Used()), cs.CondConv(), example=torch.randn(2, 4, 9, 9), inplace=inplace)


def test_a_failed_conversion_leaves_the_graph_as_it_was(graph: fx.GraphModule, x: Tensor) -> None:
    code, names = graph.code, list(graph.state_dict())
    with pytest.raises(InputError, match="No layer left to convert"):
        cs.convert(graph, cs.CondConv(), example=x, inplace=True, min_channels=100)
    assert graph.code == code
    assert list(graph.state_dict()) == names
    graph(x)


def test_a_dry_run_changes_nothing(graph: fx.GraphModule, x: Tensor) -> None:
    code = graph.code
    plan = cs.plan(graph, cs.CondConv(), example=x)
    assert [site.name for site in plan.to_convert] == ["weight_conv", "inner"]
    assert graph.code == code


def test_other_passes_before_and_after(graph: fx.GraphModule, x: Tensor) -> None:
    expected = graph.eval()(x)
    fused_first = cs.convert(fuse(graph), cs.CondConv(experts=2), example=x, skip_stem=False).model.eval()
    assert fused_first.stem.bias is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused_first.modules())
    torch.testing.assert_close(fused_first(x), expected, rtol=1e-4, atol=1e-5)
    fused_last = fuse(cs.convert(graph, cs.CondConv(experts=2), example=x).model.eval())
    assert len(conditional_layers(fused_last)) == 2
    torch.testing.assert_close(fused_last(x), expected, rtol=1e-4, atol=1e-5)
    ShapeProp(fused_last).propagate(x)
    assert all("tensor_meta" in n.meta for n in fused_last.graph.nodes if n.op == "call_module")


@pytest.mark.parametrize("routing", ["layer", "block"])
def test_a_converted_model_can_be_traced_by_fx_itself(routing: str) -> None:
    from tests.small_networks import small_net

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model = small_net()
    model.inner = Block()
    x = torch.randn(3, 3, 12, 12)
    converted = cs.convert(model, cs.CondConv(experts=2, routing=routing), example=x).model.eval()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)  # so that samples differ in their gates
    traced = fx.symbolic_trace(converted)
    targets = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"inner.a", "inner.b"} <= targets
    assert ("inner.router" in targets) is (routing == "block")
    assert torch.equal(traced(x), converted(x))
    assert isinstance(traced.get_submodule("inner.a"), ConditionalConv2d)


def test_a_conditional_classifier_is_one_node(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    converted = cs.convert(model, cs.CondConv(experts=2), example=x, classifier=True).model.eval()
    traced = fx.symbolic_trace(converted)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert torch.equal(traced(x), converted(x))


def test_a_layer_alone_is_no_graph() -> None:
    with pytest.raises(InputError, match=r"CondConv2d is the whole model[\s\S]*nn\.Sequential\(layer\)"):
        fx.symbolic_trace(CondConv2d(3, 4, 1))


def test_hooks_are_not_traced_twice(x: Tensor) -> None:
    model = cs.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), cs.CondConv(), example=x).model
    model[1].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(InputError, match="has hooks, which a graph would run twice"):
        fx.symbolic_trace(model)


def test_a_graph_comes_back_from_its_file_into_its_graph(graph: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    model = cs.convert(graph, cs.CondConv(experts=2), example=x).model.eval()
    cs.save(model, tmp_path / "graph.safetensors", alone=False)
    with pytest.raises(InputError, match="Give the unconverted model"):
        cs.load(tmp_path / "graph.safetensors")
    torch.manual_seed(1)
    loaded = cs.load(tmp_path / "graph.safetensors", model=fx.symbolic_trace(Functional()))
    assert isinstance(loaded, fx.GraphModule)
    assert torch.equal(loaded(x), model(x))


def test_an_unconverted_graph_comes_back_too(graph: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    cs.save(graph.eval(), tmp_path / "graph.safetensors", alone=False)
    loaded = cs.load(tmp_path / "graph.safetensors", model=fx.symbolic_trace(Functional()))
    assert torch.equal(loaded(x), graph(x))


def test_an_exported_program_is_refused_in_words(x: Tensor) -> None:
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), (x,))
    with pytest.raises(InputError, match=r"graph of ATen operators, as torch\.export makes"):
        cs.convert(program.module(), cs.CondConv(), example=x)
    with pytest.raises(InputError, match="was given a ExportedProgram"):
        cs.convert(program, cs.CondConv(), example=x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_a_feature_extractor_is_kept(inplace: bool, training: bool) -> None:
    """Its copies are made in train mode, and its own ``train`` switches between two graphs."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    trained = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), block, nn.Conv2d(8, 4, 1))
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        for _ in range(5):
            trained(2 * x + 1)  # running statistics that are not those of x
    net = create_feature_extractor(trained.eval(), {"2": "features"}).train(training)
    net.get_submodule("1").train(not training)
    modes = {name: module.training for name, module in net.named_modules()}
    with torch.no_grad():
        expected = net(x)["features"]
    converted = cs.convert(net, cs.CondConv(experts=4), example=x, inplace=inplace).model
    assert {name: m.training for name, m in converted.named_modules() if name in modes} == modes
    with torch.no_grad():
        torch.testing.assert_close(converted(x)["features"], expected, rtol=1e-4, atol=1e-4)


def test_one_value_of_a_setting_counts_for_height_and_width() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(self.stem(x), self.weight, stride=(2,), padding=[1])

    graph, x = fx.symbolic_trace(Net()), torch.randn(2, 3, 9, 9)
    wanted = graph(x)
    assert lift_convolutions(graph) == ()
    torch.testing.assert_close(graph(x), wanted)
    assert len(cs.convert(graph, cs.CondConv(2), example=x).plan.to_convert) == 1
