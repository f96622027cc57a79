"""Plain attributes of every harmless kind survive a file; of the others ``save`` says that the file is not enough."""

from __future__ import annotations

import argparse
import collections
import functools
import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.skeleton import describe
from condconv_surgery.recipe import CondConv
from tests.training.forked import fresh_command, fresh_python

EXAMPLE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Widths(NamedTuple):
    stem: int
    rest: tuple[int, ...]


class Holder(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Options(SimpleNamespace):
    """As Ultralytics' IterableSimpleNamespace."""


HARMLESS: list[Any] = [
    Options(width=8, inner=Options(rate=0.5)),
    torch.relu,
    torch.sigmoid,
    torch.tanh_ if hasattr(torch, "tanh_") else torch.tanh,
    F.gelu,
    F.silu,
    functools.partial(torch.softmax, dim=1),
    argparse.Namespace(width=8, names=["a", "b"]),
    SimpleNamespace(inner=SimpleNamespace(rate=0.5)),
    Widths(8, (16, 32)),
    np.float32(0.5),
    np.int64(7),
    np.bool_(True),
    np.complex64(1 + 2j),
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.linspace(0, 1, 10_000),
    np.zeros((0, 3)),
    Path("weights") / "a.pt",
    b"\x00\xff",
    1 + 2j,
    float("inf"),
    range(2, 9, 3),
    slice(None, 4),
    collections.deque([1, 2], maxlen=3),
    collections.Counter("aab"),
    collections.defaultdict(list, {"a": [1]}),
    collections.OrderedDict(b=1, a=2),
    {"nested": [{(1, 2): {3}}, frozenset({4})]},
    int,
    torch.channels_last,
    torch.float16,
    logging.getLogger("a.logger"),
    torch.randn(3, 4),
    torch.randn(100, 100),
    torch.randn(70, 70, dtype=torch.bfloat16),
    torch.randn(5000, dtype=torch.complex64),
    [torch.arange(5000), torch.zeros(0)],
    [nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(5000), requires_grad=False)],
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, functools.partial):
        return (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, nn.Parameter):
        return a.requires_grad == b.requires_grad
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("extra", HARMLESS, ids=lambda value: type(value).__name__)
def test_a_harmless_attribute_survives(extra: Any, tmp_path: Path) -> None:
    model = cs.convert(Holder(extra), CondConv(experts=2), example=EXAMPLE).model.eval()
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", trust="tests")
    assert same(extra, loaded.extra)
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    cs.save(loaded, tmp_path / "again.safetensors")
    assert same(extra, cs.load(tmp_path / "again.safetensors", trust="tests").extra)


class Slots:
    __slots__ = ("value",)


class OwnError(ValueError):
    """Python makes its objects by the constructor of an exception alone."""


def local_function() -> Any:
    def inner(x: Tensor) -> Tensor:
        return x

    return inner


HARMFUL: dict[str, Any] = {
    "lambda": lambda x: x,
    "function": local_function(),
    "Slots": Slots(),
    "OwnError": OwnError("width"),
    "Pattern": re.compile("a"),
    "from_file": torch.from_file,
    "load": torch.load,
    "system": __import__("os").system,
    "ndarray": np.array([object()]),
    "Generator": torch.Generator(),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_another_one_is_refused_when_it_is_saved(kind: str, tmp_path: Path) -> None:
    model = Holder({"deep": [HARMFUL[kind]]})
    with pytest.raises(InputError, match=r"alone could not rebuild the model: Holder\.extra(.|\n)*Try: load_model"):
        cs.save(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    cs.save(model, tmp_path / "m.safetensors", alone=False)
    assert cs.load(tmp_path / "m.safetensors", model=Holder(None)).extra is None


class Reader(nn.Module):
    """Convolutions, then a recurrent network over the columns of their map, as a reader of text has."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.recurrent = kind(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.second(self.first(x).relu()).mean(2).transpose(1, 2)
        return self.head(self.recurrent(columns)[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_survive(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    """They hold weak references to their parameters, and a list of them that must stay the same tensors."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = cs.convert(Reader(kind), cs.CondConv(2), example=x).model
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", trust=["tests"])
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    loaded.zero_grad()
    loaded(x).sum().backward()
    with torch.no_grad():
        for parameter in loaded.recurrent.parameters():  # type: ignore[union-attr]
            assert parameter.grad is not None
            parameter.add_(1.0)
    assert not torch.allclose(loaded(x), model(x))


def test_what_a_forward_left_behind_is_left_out(tmp_path: Path) -> None:
    model = Holder(None)
    model.extra = {"map": model(EXAMPLE), "constant": torch.ones(2)}
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", trust="tests")
    assert loaded.extra["map"] is None
    assert torch.equal(loaded.extra["constant"], torch.ones(2))


def test_the_command_says_how_instead(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))\n"
        "    model.key = Key()\n"
        "    return model\n"
        "class Key:\n"
        "    __slots__ = ()\n"
    )
    make = "import torch, mynet; torch.save(mynet.net(), 'm.pt'); torch.save(mynet.net().state_dict(), 'w.pt')"
    fresh_python(make, folder=tmp_path).check_returncode()
    command = partial(fresh_command, folder=tmp_path)
    refused = command("convert", "m.pt", "--trust", "mynet", "--input-size", "16", "-o", "o.safetensors")
    assert refused.returncode == 2
    assert "Sequential.key" in refused.stderr
    assert "Try: condconv convert package.module:factory --weights FILE -o FILE.safetensors" in refused.stderr
    assert not (tmp_path / "o.safetensors").exists()
    advised = command("convert", "mynet:net", "--weights", "w.pt", "--input-size", "16", "-o", "o.safetensors")
    assert advised.returncode == 0, advised.stderr
    assert command("report", "o.safetensors", "--trust", "mynet", "--json").returncode == 0


class Frozen(collections.OrderedDict[str, Any]):
    """A dict whose items are attributes and that refuses to be changed, as a configuration of diffusers."""

    def __init__(self, *items: Any, **values: Any) -> None:
        super().__init__(*items, **values)
        vars(self).update(self)

    def update(self, *items: Any, **values: Any) -> None:
        raise TypeError("it is frozen")


def test_a_dict_of_another_class_survives(tmp_path: Path) -> None:
    model = cs.convert(Holder(Frozen(width=8, kinds=("a", "b"))), CondConv(2), example=EXAMPLE).model
    cs.save(model, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"trust=\[.tests.\]"):
        cs.load(tmp_path / "m.safetensors")
    extra = cs.load(tmp_path / "m.safetensors", trust=["tests"]).extra
    assert (type(extra), list(extra.items()), extra.width) == (Frozen, [("width", 8), ("kinds", ("a", "b"))], 8)


def test_hooks_by_which_transformers_captures_outputs_are_left_out(tmp_path: Path) -> None:
    """It installs them again; any other hook would be lost."""
    namespace: dict[str, Any] = {"__name__": "transformers.utils.output_capturing"}
    exec(
        "def capture(module, args, output): pass\ndef install(module): module.register_forward_hook(capture)", namespace
    )
    model = cs.convert(Holder(None), CondConv(2), example=EXAMPLE).model.eval()
    namespace["install"](model.a)
    model._output_capturing_hooks_installed = True
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", trust=["tests"])
    assert not loaded.a._forward_hooks
    assert not hasattr(loaded, "_output_capturing_hooks_installed")
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    model.a.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(InputError, match="a Conv2d has hooks"):
        cs.save(model, tmp_path / "m.safetensors")


def test_equal_sets_are_described_alike() -> None:
    """0 and 8 fall into one slot of a small set, which then has the order of insertion."""
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    assert describe(Holder([one, frozenset(one)])) == describe(Holder([other, frozenset(other)]))
