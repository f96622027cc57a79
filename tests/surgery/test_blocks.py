"""One router for a block: against timm's own CondConv block, and on blocks made to be traced wrongly."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import condconv_surgery as cs
from condconv_surgery.errors import InputError, ProofError
from condconv_surgery.layers import RoutedBlock, autotune, conditional_layers, routed_blocks, routers, set_temperature
from condconv_surgery.recipe import CondConv, DynamicConv, Variant, recipe_of
from condconv_surgery.reporting.measure.original_model import Original
from condconv_surgery.reporting.measure.profile import profile
from condconv_surgery.training.gate_regularization import ExpertDropout, GateRecorder
from condconv_surgery.training.optimization.parameter_groups import roles
from tests.training.forked import fresh_python
from tests.variant_cases import scramble

BY_BLOCK: list[Variant] = [CondConv(experts=3, routing="block"), DynamicConv(experts=4, routing="block")]
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two convolutions, dropout that asks for the mode, a skip."""

    note = "mine"

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.second = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.second(self.first(x)), 0.3, self.training)


class Net(nn.Module):
    """A stem, the given blocks and a classifier."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def net(*blocks: nn.Module) -> Net:
    torch.manual_seed(0)
    return Net(*(blocks or (Block(), Block()))).eval()


def converted(variant: Variant = BY_BLOCK[0], model: nn.Module | None = None, **options: object) -> nn.Module:
    """A converted model whose routers are in the middle of their training."""
    made = cs.convert(model or net(), variant, example=X, **options).model
    scramble(made)
    return made


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("experts", [1, 4, 5])
def test_a_converted_block_is_timms_own(experts: int, training: bool) -> None:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    shape = {"in_chs": 8, "out_chs": 8, "exp_ratio": 3.0, "act_layer": nn.SiLU, "se_layer": blocks.SqueezeExcite}
    theirs = blocks.CondConvResidual(**shape, num_experts=experts)
    theirs.conv_dw.padding = (1, 1)
    assert isinstance(theirs.conv_pw, layers.CondConv2d)
    model = net(blocks.InvertedResidual(**shape))
    ours = converted(CondConv(experts, routing="block"), model).blocks[0]
    assert isinstance(ours, blocks.InvertedResidual)
    with torch.no_grad():
        theirs.routing_fn.load_state_dict(ours.router.linear.state_dict())
        for name, module in ours.named_children():
            if name.startswith("conv"):
                getattr(theirs, name).weight.copy_(module.paper_weights()[0].flatten(1))
            elif name != "router":
                getattr(theirs, name).load_state_dict(module.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(3, 8, 9, 9)
    results = []
    for block in (ours.train(training), theirs.train(training)):
        given = x.clone().requires_grad_()
        y = block(given)
        y.square().sum().backward()
        results.append((y, given.grad, block.conv_pwl.weight.grad, block.bn2.running_mean))
    (y, dx, dw, mean), (y2, dx2, dw2, mean2) = results
    torch.testing.assert_close(y, y2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dx2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dw.flatten(1), dw2 * 2 / experts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean, mean2)
    torch.testing.assert_close(ours.router.linear.weight.grad, theirs.routing_fn.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", BY_BLOCK, ids=lambda v: v.kind)
@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 8), ("mobilenet_v2", 17), pytest.param("googlenet", 9, marks=pytest.mark.slow)]
)
def test_the_function_is_preserved(variant: Variant, name: str, blocks: int) -> None:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    conversion = cs.convert(model, variant, example=torch.randn(2, 3, 64, 64))
    assert conversion.difference.eval.relative < 1e-5
    assert conversion.difference.train.relative < 1e-4
    assert len(conversion.plan.routers) == len(routed_blocks(conversion.model)) == blocks
    alone = set(conditional_layers(conversion.model)) - {n for r in conversion.plan.routers for n in r.layers}
    assert set(routers(conversion.model)) == alone | {router.block for router in conversion.plan.routers}
    noted = " ".join(conversion.plan.notes)
    assert all(layer in noted for layer in alone)


def test_the_block_stays_the_block() -> None:
    model = net()
    seen = []
    model.blocks[0].register_forward_hook(lambda block, args, y: seen.append(y.shape))
    made = cs.convert(model, BY_BLOCK[0], example=X, inplace=True).model
    seen.clear()
    made(X)
    block = made.blocks[0]
    assert made is model
    assert isinstance(block, Block)
    assert isinstance(block, RoutedBlock)
    assert (block.note, seen) == ("mine", [(4, 8, 32, 32)])
    assert [name for name, _ in block.named_children()] == ["first", "second", "router"]


def test_dropout_follows_the_mode_of_the_block() -> None:
    model = net()
    made = cs.convert(model, BY_BLOCK[0], example=X).model
    for training in (True, False, True):
        outputs = []
        for candidate in (model.train(training), made.train(training)):
            torch.manual_seed(1)
            outputs.append(candidate(X))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    made.blocks[0].eval()  # a frozen block in a training network
    assert torch.equal(made.blocks[0](X.repeat(1, 3, 1, 1)[:, :8]), made.blocks[0](X.repeat(1, 3, 1, 1)[:, :8]))


def test_copies_are_independent_and_compile_whole() -> None:
    model = converted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(twin(X), expected)
        twin.blocks[0].router.linear.bias.add_(1.0)
        assert not torch.allclose(twin(X), expected)
        assert torch.equal(model(X), expected)
    torch._dynamo.reset()  # its limit of recompilations counts the layers of other tests
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(X[:2]), expected[:2], rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_router_exact() -> None:
    model = converted()
    heard = []
    model.blocks[0].router.register_forward_hook(lambda router, args, mixture: heard.append(mixture.gate))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(X)
        routed = heard[0]
    assert routed.dtype == torch.float32


def test_one_training_step_moves_routers_and_experts() -> None:
    model = converted()
    found = roles(model)
    assert {name for name, role in found.items() if role == "router"} == {name for name in found if ".router." in name}
    assert {name for name, role in found.items() if role == "experts"} == {
        f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("first.0", "second")
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(X).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {name for name, role in found.items() if role in ("router", "experts")}


def test_the_temperature_is_that_of_the_block() -> None:
    model = converted(DynamicConv(experts=4, routing="block"))
    sharp = model(X)
    assert set_temperature(model, 30.0) == 2
    gates = GateRecorder(model)
    assert not torch.allclose(model(X), sharp)
    assert all(float((gate.detach() - 0.25).abs().max()) < 0.1 for gate in gates.take().values())


def test_gates_are_recorded_and_thinned_once_a_block() -> None:
    model = converted(CondConv(experts=4, routing="block"))
    recorder = GateRecorder(model)
    model.train()(X)
    assert {name: tuple(gate.shape) for name, gate in recorder.take().items()} == {
        "blocks.0": (4, 4),
        "blocks.1": (4, 4),
    }
    dropout = ExpertDropout(model, 0.5)
    zeros = torch.stack([(model.blocks[0].router(torch.rand(4, 8)).gate == 0).float().mean() for _ in range(200)])
    assert 0.4 < float(zeros.mean()) < 0.5  # dropped once for each layer it would be 0.75; where all would go, all stay
    dropout.close()
    recorder.close()


def test_frozen_layers_have_a_frozen_router() -> None:
    model = net().requires_grad_(False)
    made = cs.convert(model, BY_BLOCK[0], example=X).model
    assert not any(p.requires_grad for p in made.parameters())


def test_the_report_has_one_router_a_block() -> None:
    model = converted(CondConv(experts=4, routing="block"))
    found = profile(model, X)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    rows = {row.name: row for row in found.layers}
    assert rows["blocks.0.router"].kind == "router"
    assert rows["blocks.0.router"].macs.total == rows["blocks.0.router"].macs.routing == 8 * 4
    assert rows["blocks.0.second"].macs.mixing == 4 * 16 * 8 * 9
    assert rows["blocks.0.second"].macs.routing == 0
    with FlopCounterMode(display=False) as meter, torch.no_grad():
        model(X[:1])
    assert found.macs.total == meter.get_total_flops() / 2
    assert found.converted == 4
    assert found.parameters_before == sum(p.numel() for p in net().parameters())


def test_the_original_runs_in_place_of_the_converted() -> None:
    model = net()
    made = cs.convert(model, BY_BLOCK[0], example=X).model
    scramble(made)
    with torch.no_grad():
        routed = made(X)
        with Original(made).in_place():
            torch.testing.assert_close(made(X), model(X), rtol=1e-5, atol=1e-5)
        assert torch.equal(made(X), routed)
    assert set(autotune(made, X, repeats=1)) <= set(conditional_layers(made))
    torch.testing.assert_close(made(X), routed, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """A block inside a block, beside two layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Conv2d(8, 8, 1), Block(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


def test_blocks_in_blocks() -> None:
    conversion = cs.convert(net(Twice()), BY_BLOCK[0], example=X)
    assert {r.block: r.layers for r in conversion.plan.routers} == {
        "blocks.0": ("blocks.0.before", "blocks.0.after"),
        "blocks.0.inner": ("blocks.0.inner.first.0", "blocks.0.inner.second"),
    }


def test_blocks_that_the_user_names() -> None:
    conversion = cs.convert(net(Twice(), Block()), BY_BLOCK[0], example=X, blocks=["re:blocks\\.\\d"])
    assert [(r.block, len(r.layers)) for r in conversion.plan.routers] == [("blocks.0", 4), ("blocks.1", 2)]
    with pytest.raises(InputError, match=r'blocks=\["layer4"\] names no module'):
        cs.convert(net(), BY_BLOCK[0], example=X, blocks=["layer4"])
    with pytest.raises(InputError, match='blocks= without routing="block"'):
        cs.convert(net(), CondConv(), example=X, blocks=["blocks.0"])
    with pytest.raises(InputError, match=r"No block of the model can share a router: .* bare container"):
        cs.convert(net(), BY_BLOCK[0], example=X, blocks=["blocks"])


class OfValues(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x + self.second(self.first(x))


class OfChance(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if random.random() < 2 else x


class OfNoise(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.ones(1)


class WithoutGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
        return x + self.second(y)


class WithOption(Block):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x if scale is None else x * scale)


class WithHook(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, y: y * 1.0)


class WithRouter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Identity()


class OnHalves(Block):
    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat(x.chunk(2, dim=2))
        return super().forward(torch.cat(halves.chunk(2), dim=2)) + torch.cat(
            self.second(self.first(halves)).chunk(2), 2
        )


REFUSED = {
    OfValues: "it cannot be traced: TraceError",
    OfChance: "draws random numbers",
    OfNoise: "makes tensors",
    WithoutGradient: "changes the gradient",
    WithOption: "an optional argument 'scale'",
    WithHook: "first inside it has hooks",
    WithRouter: "an attribute 'router' already",
    OnHalves: "sees a batch of another size",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda cls: cls.__name__)
def test_a_block_that_a_graph_would_not_be(kind: type[Block]) -> None:
    model = net(Block(), kind())
    attributes = set(model.blocks[1].__dict__)
    conversion = cs.convert(model, BY_BLOCK[0], example=X)
    assert [router.block for router in conversion.plan.routers] == ["blocks.0"]
    assert len(conditional_layers(conversion.model)) == 4
    note = conversion.plan.notes[-1]
    assert REFUSED[kind] in note
    assert "blocks.1.second" in note
    assert type(conversion.model.blocks[1]) is kind
    assert set(model.blocks[1].__dict__) == attributes
    with pytest.raises(InputError, match=f"No block of the model can share a router: .*{REFUSED[kind]}"):
        cs.convert(net(kind()), BY_BLOCK[0], example=X)


def test_a_layer_that_others_call_too_keeps_its_router() -> None:
    class Outside(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks(self.stem(x))
            return self.head((y + self.blocks[0].first(y)[:, :8]).mean((2, 3)))

    torch.manual_seed(0)
    conversion = cs.convert(Outside(Block(), Block()).eval(), BY_BLOCK[0], example=X)
    assert [router.block for router in conversion.plan.routers] == ["blocks.1"]
    assert "blocks.0.first.0 is called by others than the block's forward" in conversion.plan.notes[0]


def test_a_failed_proof_leaves_the_blocks_as_they_were() -> None:
    model = net()
    with torch.no_grad():
        expected = model(X)
    with pytest.raises(ProofError):
        cs.convert(model, BY_BLOCK[0], example=X, inplace=True, tolerance=0.0)
    assert type(model.blocks[0]) is Block
    assert not routers(model)
    assert torch.equal(model(X), expected)


def test_odconv_cannot_share_a_router() -> None:
    with pytest.raises(InputError, match="ODConv cannot share a router"):
        cs.ODConv(experts=4, routing="block")
    with pytest.raises(InputError, match=r"routing is 'net'.\n.*layer, block"):
        cs.CondConv(routing="net")


def test_a_layer_without_router_wants_a_mixture() -> None:
    layer = converted().blocks[0].second
    with pytest.raises(InputError, match=r"has no router: .*\n.*\n  Try: call the block"):
        layer(torch.rand(1, 16, 4, 4))


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None, width_mult=0.25).eval()
    model = converted(BY_BLOCK[1], model, include=["features.1[0-9]*"])
    cs.save(model, tmp_path / "m.safetensors")
    torch.save({"x": X, "y": model(X).detach()}, tmp_path / "xy.pt")
    code = (
        "import sys, torch, condconv_surgery as cs; m = cs.load(sys.argv[1]); t = torch.load(sys.argv[2]); "
        "assert torch.equal(m(t['x']), t['y']); m.train()(t['x']).sum().backward(); cs.save(m, sys.argv[1])"
    )
    done = fresh_python(code, tmp_path / "m.safetensors", tmp_path / "xy.pt", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = cs.load(tmp_path / "m.safetensors")
    assert list(routers(again)) == list(routers(model))
    assert recipe_of(again).routers == tuple(
        type(r)(r.block, r.channels, r.layers) for r in recipe_of(again).routers if r.block.startswith("features.1")
    )


def test_a_model_of_its_own_class_needs_its_skeleton_only(tmp_path: Path) -> None:
    model = converted()
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", model=net())
    assert torch.equal(loaded(X), model.eval()(X))
    assert torch.equal(cs.load(tmp_path / "m.safetensors", trust=("tests",))(X), model(X))
