"""What else models do to convolutions: computed weights, readers of weights, wrappers, other memory and devices."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import condconv_surgery as cs
from condconv_surgery.errors import InputError, ProofError
from condconv_surgery.layers import ConditionalConv2d, conditional_layers


def net(layer: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer or nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def reasons(model: nn.Module, x: Tensor) -> dict[str, str]:
    return {skip.name: skip.reason for skip in cs.convert(model, cs.CondConv(), example=x).plan.skipped}


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def old(function: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def applied(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in every old checkpoint
            return function(layer)

    return applied


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Twice())
    return layer


COMPUTED = {
    "weight norm": (parametrizations.weight_norm, "its weight is computed by a parametrization"),
    "spectral norm": (parametrizations.spectral_norm, "remove_parametrizations makes it plain"),
    "orthogonal": (parametrizations.orthogonal, "its weight is computed by a parametrization"),
    "the user's own": (doubled, "its weight is computed by a parametrization"),
    "old weight norm": (old(nn.utils.weight_norm), r"computed by a hook (WeightNorm; remove_weight_norm"),
    "old spectral norm": (old(nn.utils.spectral_norm), r"computed by a hook (SpectralNorm; "),
    "a pruned weight": (lambda m: prune.l1_unstructured(m, "weight", 0.3), r"its weight is computed by a hook (L1"),
    "a pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), r"its bias is computed by a hook (L1"),
}


@pytest.mark.parametrize(("change", "reason"), COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_left_alone(change: Callable[[nn.Module], nn.Module], reason: str, x: Tensor) -> None:
    assert reason in reasons(net(change(nn.Conv2d(4, 4, 3))), x)["1"]


def test_a_mask_made_permanent_is_converted_and_holds(x: Tensor) -> None:
    layer = prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)
    zeros = prune.remove(layer, "weight").weight == 0
    converted = cs.convert(net(layer), cs.CondConv(), example=x).model[1]
    assert converted.weight.mean(0)[zeros].abs().max() < 1e-7


def test_lazy_layers_are_named_and_stay_lazy(x: Tensor) -> None:
    model = net(nn.LazyConv2d(4, 3))
    with pytest.raises(InputError, match=r"1\.weight belongs to a lazy layer"):
        cs.convert(model, cs.CondConv(), example=x)
    assert isinstance(model[1], nn.LazyConv2d)
    model(x)
    assert "1" in conditional_layers(cs.convert(model, cs.CondConv(), example=x).model)


class Reader(nn.Module):
    """Computes with its child's weight, or looks at it only."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.use(self.second, self.first(x)))


USES = {
    "functional": lambda conv, x: F.conv2d(x, conv.weight, conv.bias),
    "as well": lambda conv, x: conv(x) + F.conv2d(x, conv.weight),
    "penalty": lambda conv, x: conv(x) * conv.weight.square().mean(),
    "slice": lambda conv, x: conv(x) + conv.weight[0, 0, 0, 0],
    "bias": lambda conv, x: conv(x) - conv.bias.view(1, -1, 1, 1),
}
LOOKS = {
    "dtype": lambda conv, x: conv(x.to(conv.weight.dtype)),
    "device": lambda conv, x: conv(x.to(conv.weight.device)),
    "new": lambda conv, x: conv(x) + conv.weight.new_zeros(1),
    "grad": lambda conv, x: conv(x) if conv.weight.requires_grad else x,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_layer_whose_weight_others_use_is_left_alone(use: Callable[..., Tensor], x: Tensor) -> None:
    model = Reader(use)
    plan = cs.convert(model, cs.CondConv(), example=x).plan
    assert {s.name: s.reason for s in plan.skipped}["second"] == "Reader computes with its weight outside of it"
    assert [site.name for site in plan.to_convert] == ["third"]


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looking_at_a_weight_is_no_use(look: Callable[..., Tensor], x: Tensor) -> None:
    plan = cs.convert(Reader(look), cs.CondConv(), example=x).plan
    assert [site.name for site in plan.to_convert] == ["second", "third"]


class OwnParameter(nn.Module):
    def __init__(self, head: bool) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.head = nn.Conv2d(3, 4, 1) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.conv2d(x, weight=self.kernel) + x.mean())


def test_a_functional_convolution_is_named(x: Tensor) -> None:
    plan = cs.convert(OwnParameter(head=True), cs.CondConv(), example=x, skip_stem=False).plan
    assert {s.name: s.reason for s in plan.skipped} == {
        "kernel": "F.conv2d on a parameter, in OwnParameter.forward: "
        "converted if the whole model is a torch.fx.GraphModule"
    }
    with pytest.raises(InputError, match=r"has no nn.Conv2d, only F.conv2d with kernel[\s\S]*symbolic_trace"):
        cs.convert(OwnParameter(head=False), cs.CondConv(), example=x)
    graph = torch.fx.symbolic_trace(OwnParameter(head=False))
    assert cs.convert(graph, cs.CondConv(), example=x, skip_stem=False).plan.to_convert[0].name == "kernel_conv"


class Listed(nn.Module):
    """Calls a layer through a plain list, with or without a name for it."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        layer = nn.Conv2d(4, 4, 3)
        self.hidden = [layer]
        if named:
            self.named = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden[0](self.stem(x)))


class Closed(nn.Module):
    """Calls a layer through a closure, which a copy of the model keeps, and by its name too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.named, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        layer = self.named
        self.again = lambda x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.named(self.stem(x))))


def compiled_inside() -> nn.Module:
    compiled = torch.compile(nn.Conv2d(4, 4, 3), backend="eager")
    return nn.Sequential(nn.Conv2d(3, 4, 1), compiled, nn.Conv2d(4, 4, 1))


HELD = {
    "a list": (lambda: Listed(named=True), "named", "last"),
    "a closure": (Closed, "named", "last"),
    "compiled": (compiled_inside, "1._orig_mod", "2"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("prove", [False, True])
@pytest.mark.parametrize(("make", "held", "other"), HELD.values(), ids=HELD)
def test_a_layer_called_from_where_no_replacement_reaches_is_left_alone(
    make: Callable[[], nn.Module], held: str, other: str, prove: bool, inplace: bool, x: Tensor
) -> None:
    torch.manual_seed(0)
    model = make()
    layer = model.get_submodule(held)
    with torch.compiler.set_stance("force_eager"):
        before = model(x)
    planned = cs.plan(model, cs.CondConv(), example=x, inplace=inplace)
    assert model.get_submodule(held) is layer
    assert not layer._forward_hooks
    conversion = cs.convert(model, cs.CondConv(), example=x, prove=prove, inplace=inplace)
    reason = {skip.name: skip.reason for skip in conversion.plan.skipped}[held]
    assert reason.startswith("called from where it cannot be replaced: a list or a closure, say")
    assert set(conditional_layers(conversion.model)) == {other} == {site.name for site in planned.to_convert}
    assert conversion.plan.skipped == planned.skipped
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(conversion.model(x), before)
    with pytest.raises(InputError, match=r"the only convolution of .* is skipped: called from where"):
        cs.plan(make(), cs.CondConv(), example=x, include=held)


def test_a_held_layer_that_comes_first_is_the_stem(x: Tensor) -> None:
    model = Listed(named=True)
    model.hidden = [model.stem]
    model.forward = lambda x: model.last(model.named(model.hidden[0](x)))
    plan = cs.plan(model, cs.CondConv(), example=x, inplace=True)  # its forward runs this very model
    assert [site.name for site in plan.to_convert] == ["named", "last"]
    assert [skip.name for skip in plan.skipped] == ["stem"]


class Notices(Listed):
    """Calls the hidden layer only once the named one is another."""

    def __init__(self) -> None:
        super().__init__(named=True)
        self.stem = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.named, ConditionalConv2d):
            return self.last(self.hidden[0](self.stem(x)) if x.sum() == x.sum() else x)
        return self.last(self.named(self.stem(x)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_turns_away_from_a_replacement_is_refused(inplace: bool, x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Notices())
    with pytest.raises(InputError, match=r"still calls the replaced 1.named[\s\S]*ModuleList[\s\S]*exclude="):
        cs.convert(model, cs.CondConv(), example=x, inplace=inplace)
    assert not conditional_layers(model)


def test_a_model_that_tells_its_layers_by_identity_is_looked_at_as_it_is(x: Tensor) -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.scales = {self.second: 2.0}

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)) * self.scales[self.second])

    model = Keyed()
    plan = cs.plan(model, cs.CondConv(), example=x, exclude=["second"])
    assert [site.name for site in plan.to_convert] == ["third"]
    assert [note.partition(":")[0] for note in plan.notes] == [
        "not run in eval mode with clones of its layers",
        "not run in train mode with clones of its layers",
    ]
    converted = cs.convert(model, cs.CondConv(), example=x, exclude=["second"], inplace=True).model
    torch.testing.assert_close(converted.scales, {model.second: 2.0})


def test_a_direct_call_of_forward_is_named(x: Tensor) -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second.forward(self.first(x)))

    assert reasons(Direct(), x)["second"] == (
        "Direct calls its forward directly, past its hooks (self.conv(x) in place of self.conv.forward(x) "
        "makes its calls known)"
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_that_cannot_be_routed_once_converted_is_refused(inplace: bool, x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Usual(), Notices()))
    names = list(model.state_dict())
    with pytest.raises(InputError, match=r"1\.1 cannot share a router[\s\S]*torch.fx must[\s\S]*routing=\"layer\""):
        cs.convert(model, cs.CondConv(routing="block"), example=x, prove=False, inplace=inplace)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model[1]] == [Usual, Notices]
    assert not conditional_layers(model)


class Usual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def test_a_layer_that_the_model_does_not_register_is_noted(x: Tensor) -> None:
    plan = cs.convert(Listed(named=False), cs.CondConv(), example=x).plan
    assert [site.name for site in plan.to_convert] == ["last"]
    assert any("Listed convolves with a parameter that the model does not register" in note for note in plan.notes)
    assert not any("register" in note for note in cs.convert(net(), cs.CondConv(), example=x).plan.notes)


def test_layers_that_share_a_weight_keep_sharing_it(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[2].weight = model[1].weight
    conversion = cs.convert(model, cs.CondConv(), example=x)
    skipped = {skip.name: skip.reason for skip in conversion.plan.skipped}
    assert skipped["1"] == "2.weight is the same parameter as one of its own; they would no longer be tied"
    assert skipped["2"] == "1.weight is the same parameter as one of its own; they would no longer be tied"
    assert conversion.model[1].weight is conversion.model[2].weight
    assert [site.name for site in conversion.plan.to_convert] == ["3"]


class Tied(nn.Module):
    """A weight or a bias that another layer, never called, or the parent holds too; and a layer with two names."""

    def __init__(self, kind: str, by: str) -> None:
        super().__init__()
        self.stem, self.tied, self.free = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.again = self.free
        if by == "spare":
            self.spare = nn.Conv2d(4, 4, 3)
            setattr(self.spare, kind, getattr(self.tied, kind))
        else:
            self.own = getattr(self.tied, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.free(self.tied(self.stem(x))))


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("by", ["spare", "own"])
def test_a_tie_is_not_cut(kind: str, by: str, x: Tensor) -> None:
    model = Tied(kind, by)
    conversion = cs.convert(model, cs.CondConv(), example=x)
    skipped = {skip.name: skip.reason for skip in conversion.plan.skipped}
    other = f"spare.{kind}" if by == "spare" else "own"
    assert skipped["tied"] == f"{other} is the same parameter as one of its own; they would no longer be tied"
    assert skipped.get("spare", "") == ("" if by == "own" else skipped["tied"].replace("spare", "tied"))
    assert [site.names for site in conversion.plan.to_convert] == [("free", "again")]
    assert getattr(conversion.model.tied, kind) is conversion.model.get_parameter(other)


def test_a_classifier_whose_weight_is_computed_is_left_alone(x: Tensor) -> None:
    model = nn.Sequential(net(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), parametrizations.weight_norm(nn.Linear(4, 3)))
    plan = cs.convert(model, cs.CondConv(), example=x, classifier=True).plan
    assert "its weight is computed by a parametrization" in {s.name: s.reason for s in plan.skipped}["3"]


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_layer_with_a_forward_of_its_own_is_left_alone(factor: float, x: Tensor) -> None:
    model = net()
    usual = model[1].forward
    model[1].forward = lambda x: usual(x) * factor
    plan = cs.convert(model, cs.CondConv(), example=x).plan
    assert "its forward was replaced on the object" in {skip.name: skip.reason for skip in plan.skipped}["1"]


def test_a_part_in_torchscript_is_no_obstacle(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), scripted, nn.Conv2d(4, 4, 1))
    assert set(conditional_layers(cs.convert(model, cs.CondConv(), example=x).model)) == {"2"}


def test_a_single_layer_is_refused(x: Tensor) -> None:
    with pytest.raises(InputError, match=r"a single Conv2d[\s\S]*nn\.Sequential\(layer\)"):
        cs.convert(nn.Conv2d(3, 4, 1), cs.CondConv(), example=x, skip_stem=False)


def test_frozen_layers_stay_frozen(x: Tensor) -> None:
    model = net()
    model[1].requires_grad_(False)
    converted = cs.convert(model, cs.CondConv(), example=x).model
    assert not any(parameter.requires_grad for parameter in converted[1].parameters())
    assert all(parameter.requires_grad for parameter in converted[3].parameters())
    model[1].bias.requires_grad_(True)  # training biases alone is a method
    converted = cs.convert(model, cs.CondConv(), example=x).model
    assert [name for name, parameter in converted[1].named_parameters() if parameter.requires_grad] == ["bias"]


@pytest.mark.parametrize(
    "wrap", [DataParallel, torch.compile, AveragedModel], ids=["DataParallel", "torch.compile", "AveragedModel"]
)
def test_a_wrapper_is_taken_off(wrap: Callable[[nn.Module], nn.Module], x: Tensor, tmp_path: Path) -> None:
    plain = net().eval()
    conversion = cs.convert(wrap(plain), cs.CondConv(), example=x, include=["1"])
    assert type(conversion.model) is nn.Sequential
    assert any("taken off: wrap the converted model again" in note for note in conversion.plan.notes)
    torch.testing.assert_close(conversion.model.eval()(x), plain(x))
    cs.save(conversion.model, tmp_path / "m.safetensors")
    assert type(cs.load(tmp_path / "m.safetensors")) is nn.Sequential


class OwnForward(nn.Sequential):
    """torch 2.10 does not compile ``nn.Sequential.forward`` in place: it skips the files of ``torch.nn``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_model_compiled_in_place_is_converted_without_compiling(x: Tensor) -> None:
    counted = torch._dynamo.testing.CompileCounter()
    model = OwnForward(*net()).eval()
    model.compile(backend=counted)
    converted = cs.convert(model, cs.CondConv(), example=x).model
    assert counted.frame_count == 0
    assert isinstance(converted[1], ConditionalConv2d)
    torch.testing.assert_close(model(x), converted.eval()(x))
    assert counted.frame_count == 1  # the original still is compiled


@pytest.fixture
def one_process(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_models_of_many_processes(x: Tensor) -> None:
    wrapped = DistributedDataParallel(net())
    converted = cs.convert(wrapped, cs.CondConv(), example=x).model
    assert set(conditional_layers(converted)) == {"1", "3"}
    assert not conditional_layers(wrapped)
    with pytest.raises(InputError, match=r"cannot be converted in place[\s\S]*ddp.module"):
        cs.convert(wrapped, cs.CondConv(), example=x, inplace=True)
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match="is split over processes"):
        cs.convert(sharded, cs.CondConv(), example=x)


def test_weights_on_meta_have_no_proof_but_an_architecture(x: Tensor) -> None:
    model = net().to("meta")
    with pytest.raises(InputError, match=r"is on the meta device[\s\S]*prove=False"):
        cs.convert(model, cs.CondConv(), example=x)
    converted = cs.convert(model, cs.CondConv(experts=3), example=x, prove=False).model
    assert converted[1].weight.is_meta
    assert converted[1].weight.shape == (3, 4, 4, 3, 3)


def test_a_model_on_meta_with_a_computed_weight_is_copied(x: Tensor) -> None:
    with torch.device("meta"):
        model = nn.Sequential(net(), old(nn.utils.weight_norm)(nn.Conv2d(4, 4, 1)))
        model.append(nn.Sequential(nn.Conv2d(4, 4, 1)))
    plan = cs.convert(model, cs.CondConv(), example=x, prove=False).plan
    assert "1" in {skip.name for skip in plan.skipped}
    assert "2.0" in {site.name for site in plan.to_convert}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_channels_last_weights_of_any_precision(dtype: torch.dtype, x: Tensor) -> None:
    model = net().eval().to(dtype).to(memory_format=torch.channels_last)
    x = x.to(dtype).to(memory_format=torch.channels_last)
    conversion = cs.convert(model, cs.CondConv(), example=x)
    assert conversion.model[1].weight.dtype == dtype
    assert conversion.difference.eval.relative < (1e-5 if dtype == torch.float32 else 2e-2)


def test_torchscript_is_refused(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        scripted = torch.jit.trace(net().eval(), x)
    with pytest.raises(InputError, match="The model is TorchScript"):
        cs.convert(scripted, cs.CondConv(), example=x)


class OnlyFloat32(nn.Module):
    """Amplifies rounding without end, and refuses float64."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("float32 only")
        y = self.second(self.first(x))
        shift = 1e-3 if self.wrong and isinstance(self.second, ConditionalConv2d) else 0.0
        return (y * 1e4 + shift * 1e4).sin()


def test_a_model_that_refuses_float64_is_judged_by_its_own_noise(x: Tensor) -> None:
    torch.manual_seed(0)
    conversion = cs.convert(OnlyFloat32(), cs.CondConv(experts=3), example=x)
    assert conversion.difference_float64 is None
    assert any(
        "does not run in float64, and as large a difference comes from rounding" in n for n in conversion.plan.notes
    )
    torch.manual_seed(0)
    with pytest.raises(ProofError, match="differs from the original"):
        cs.convert(OnlyFloat32(wrong=True), cs.CondConv(experts=3), example=x)


def test_a_difference_that_nothing_explains_is_no_rounding(x: Tensor) -> None:
    class Alters(OnlyFloat32):
        def forward(self, x: Tensor) -> Tensor:
            if self.second.weight.dim() == 4 and "forward" in vars(self.second):
                raise TypeError("the layer must be itself")
            return super().forward(x)

    with pytest.raises(ProofError, match="differs from the original"):
        cs.convert(Alters(wrong=True), cs.CondConv(experts=3), example=x)


def test_targets_may_have_to_stay_float32(x: Tensor) -> None:
    class WithTarget(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            if target.dtype != torch.float32:
                raise TypeError("a float32 target")
            return ((self.second(self.first(x)) - target.to(x.dtype)) * 1e4).sin()

    torch.manual_seed(0)
    conversion = cs.convert(WithTarget(), cs.CondConv(experts=3), example=(x, torch.ones(1)))
    assert conversion.difference.eval.relative > 1e-4
    assert conversion.difference_float64.eval.relative < 1e-10


def test_one_line_for_each_reason_not_to_trace(x: Tensor) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > -1e9 else x

    model = nn.Sequential(*(Branches() for _ in range(5)))
    planned = cs.plan(model, cs.CondConv(), example=x, skip_stem=False)
    notes = planned.followers.notes()
    assert notes[0] in str(planned)
    assert len(notes) == 1
    assert notes[0].startswith("not traced: the whole model, 0, 1 and 3 more: TraceError")


def test_a_model_too_large_for_float64_is_judged_by_its_noise(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condconv_surgery.surgery.proof.rounding_error.FLOAT64_BYTES", 0)
    monkeypatch.setattr(OnlyFloat32, "double", lambda self: pytest.fail("float64 was tried"))
    torch.manual_seed(0)
    for inplace in (False, True):
        conversion = cs.convert(OnlyFloat32(), cs.CondConv(experts=3), example=x, inplace=inplace)
        assert any("takes too much memory in float64" in note for note in conversion.plan.notes)
