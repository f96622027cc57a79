"""Which of several sets of weights in a training checkpoint is taken, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.models.checkpoints.read_checkpoint import read_weights
from condconv_surgery.models.sources import load_model

State = dict[str, torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)


torch.manual_seed(0)
RAW, AVERAGE = (
    {name: tensor + tensor.new_full(tensor.shape, shift) for name, tensor in Net().state_dict().items()}
    for shift in (3, 7)
)
PARAMETERS = {name: AVERAGE[name] for name, _ in Net().named_parameters()}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def taken(content: Any, path: Path, caplog: pytest.LogCaptureFixture) -> tuple[State, str]:
    """The model that the file fills, its tensors by name; and what was said."""
    caplog.clear()
    torch.save(content, path)
    with caplog.at_level(logging.WARNING):
        model = load_model(path, arch="tests.files.test_weight_sets:Net")
    return dict(model.state_dict()), caplog.text


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


AVERAGED_KEYS = """ema_shadow swa_model shadow_params averaged avg_model ema_weights netG_ema modelEMA
state_dict_swa"""


@pytest.mark.parametrize("key", AVERAGED_KEYS.split())
def test_a_key_with_a_word_for_averages_is_one(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for average in (AVERAGE, {"n_averaged": torch.tensor(3), **under("module.", AVERAGE)}):
        state, said = taken({"model": RAW, key: average, "epoch": 3}, tmp_path / "m.pt", caplog)
        assert equal(state, AVERAGE)
        assert f"took the weights under {key!r} (averaged), not those under model" in said


NESTED: dict[str, tuple[Callable[[], Any], str]] = {
    "the class EMA of many scripts": (lambda: {"ema": {"shadow": AVERAGE, "decay": 0.9}}, "'ema.shadow' (averaged)"),
    "a callback of Lightning": (
        lambda: {"callbacks": {"EMA": {"ema_state_dict": under("net.", AVERAGE)}}},
        "'callbacks.EMA.ema_state_dict' (averaged)",
    ),
    "one dict, its prefix first": (
        lambda: {"model": {**under("model_ema.", AVERAGE), **under("model.", RAW)}},
        "took the averaged weights, whose names begin with 'model_ema.'",
    ),
    "one dict": (
        lambda: {"model": {**under("net.", RAW), **under("ema_net.", AVERAGE)}},
        "took the averaged weights, whose names begin with 'ema_net.'",
    ),
    "parameters alone": (
        lambda: {"ema": {"shadow": PARAMETERS, "decay": 0.9}, "model": {**RAW, **buffers_of(AVERAGE)}},
        "3 tensors beside the averaged ones are those under 'model'",
    ),
    "parameters alone, beside a wrapper": (
        lambda: {"ema": PARAMETERS, "model": under("module.", {**RAW, **buffers_of(AVERAGE)})},
        "3 tensors beside the averaged ones are those under 'model'",
    ),
    "parameters without names": (
        lambda: {
            "ema": {"decay": 0.9, "shadow_params": list(PARAMETERS.values()), "collected_params": None},
            "model": {**RAW, **buffers_of(AVERAGE)},
        },
        "took the averaged parameters under 'ema.shadow_params' in their place",
    ),
}


def buffers_of(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name not in PARAMETERS}


@pytest.mark.parametrize("kind", NESTED)
def test_an_average_is_found_where_scripts_keep_it(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, expected = NESTED[kind]
    state, said = taken({"model": RAW, "epoch": 3, **make()}, tmp_path / "m.pt", caplog)
    assert equal(state, AVERAGE)
    assert expected in said


def test_parameters_without_names_that_do_not_fit_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"model": RAW, "ema": {"shadow_params": list(PARAMETERS.values())[:3]}}
    state, said = taken(content, tmp_path / "m.pt", caplog)
    assert equal(state, RAW)
    assert "the averaged parameters under 'ema.shadow_params' have no names and were not taken" in said


def test_mmengine_keeps_the_average_as_state_dict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = {"steps": torch.tensor(4), **under("module.", RAW)}
    state, said = taken({"meta": {}, "state_dict": AVERAGE, "ema_state_dict": raw}, tmp_path / "m.pt", caplog)
    assert equal(state, AVERAGE)
    assert "took the weights under 'state_dict' (averaged), not those under ema_state_dict" in said


def test_what_is_no_network_is_not_taken_for_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adam = torch.optim.Adam(Net().parameters())
    Net().stem(torch.zeros(1, 3, 8, 8)).sum().backward()
    content = {
        "net_of_mine": RAW,
        "optimizer_ema": {"state": RAW},
        "optim": adam.state_dict(),
        "rng_state": {"cpu": torch.zeros(3, 3)},
        "averaging_state": {"n_averaged": torch.tensor(2)},
        "loss_avg": torch.zeros(2, 2),
    }
    content["itself"] = content
    state, said = taken(content, tmp_path / "m.pt", caplog)
    assert equal(state, RAW)
    assert "took the weights under 'net_of_mine'\n" in said


def test_an_extra_state_with_tensors_is_no_set(tmp_path: Path) -> None:
    extra = {"_extra_state": {"scales": {"weight": torch.ones(3, 3)}}}
    torch.save({**RAW, **extra}, tmp_path / "m.pt")
    assert equal(read_weights(tmp_path / "m.pt"), RAW)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ([RAW, AVERAGE], "0, 1"),
        ({"generator": RAW, "discriminator": AVERAGE}, "generator, discriminator"),
        ({"generator": {"state_dict": RAW}, "discriminator": {"state_dict": AVERAGE}}, "generator.state_dict, "),
        ({"model": RAW, "swa_model": dict(RAW), "ema_shadow": AVERAGE}, "model, swa_model, ema_shadow"),
        ({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3)}, "a, b"),
    ],
)
def test_of_equal_sets_one_must_be_chosen(content: Any, names: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "several.pt")
    with pytest.raises(InputError, match=f"holds several sets of weights: {names}") as error:
        read_weights(Path("several.pt"))
    exec(error.value.fix, {"torch": torch})
    first = content[0] if isinstance(content, list) else next(iter(content.values()))
    first = first.state_dict() if isinstance(first, nn.Module) else first.get("state_dict", first)
    assert equal(read_weights(Path("model.pt")), first)


def test_the_only_set_of_a_list_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, said = taken((RAW, 3), tmp_path / "m.pt", caplog)
    assert equal(state, RAW)
    assert "took the weights under '0'" in said


def test_arrays_of_numpy_are_weights_where_they_may_be_read(tmp_path: Path) -> None:
    torch.save({"model": {name: tensor.numpy() for name, tensor in RAW.items()}, "__author__": "x"}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r'Try: trust=\["numpy"\]'):
        read_weights(tmp_path / "m.pt")
    assert equal(read_weights(tmp_path / "m.pt", ("numpy",)), RAW)
