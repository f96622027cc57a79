"""Frozen layers stay frozen for one run: the model in memory is afterwards as free to learn as before it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import CondConv
from condconv_surgery.training import finetune
from condconv_surgery.training.optimization.parameter_groups import frozen_note, preserving_frozen
from tests.images import write_images
from tests.small_networks import small_net
from tests.training.test_training_run import StopAt, options_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=7)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "layers", [{"freeze": ["stem", "norm", "head"]}, {"warm_routers": 1}, {"batch_norm": "freeze"}]
)
def test_a_second_run_trains_everything(folder: Path, layers: dict[str, object]) -> None:
    model = small_net(CondConv(experts=2))
    options = options_for(folder, epochs=1)
    finetune(model, options.updated({"layers": layers}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finetune(model, options.updated({"output": str(folder.parent / "second")}))
    kept = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert kept == []


def test_layers_are_free_after_a_stop_and_after_an_error(folder: Path) -> None:
    model = small_net()
    options = options_for(folder).updated({"layers": {"freeze": ["stem"]}})
    finetune(model, options, callback=StopAt(2, signal.SIGTERM))
    assert trained(model) == set(dict(model.named_parameters()))
    with pytest.raises(InputError, match="already holds a run"):
        finetune(model, options)
    with pytest.raises(InputError, match="freezes all of them"):
        finetune(model, options.updated({"output": "other", "layers": {"freeze": ["*"]}}))
    assert trained(model) == set(dict(model.named_parameters()))


def test_what_came_frozen_stays_and_a_note_says_so(folder: Path) -> None:
    """Also the layer's norm, which the options freeze too; the old head was frozen, the new one learns."""
    model = small_net(classes=7)
    for layer in (model.stem, model.norm, model.head):
        layer.requires_grad_(False)
    callback = StopAt(-1, 0)
    finetune(model, options_for(folder, epochs=1).updated({"layers": {"freeze": ["nor*"]}}), callback=callback)
    assert trained(model) == {"inner.weight", "inner.bias", "head.weight", "head.bias"}
    note = (
        "224 parameters are frozen, as they came, and stay so: stem.weight, stem.bias. requires_grad_(True) on a layer"
    )
    assert sum(line.startswith(note) for line in callback.lines) == 1
    assert frozen_note(small_net(), ()) == []


def test_parameters_that_are_exchanged_keep_their_flag() -> None:
    """As sharding does."""
    model = small_net()
    model.stem.requires_grad_(False)
    with preserving_frozen(model):
        model.requires_grad_(False)
        for layer in (model.stem, model.inner):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert set(dict(model.named_parameters())) - trained(model) == {"stem.weight", "stem.bias"}


def test_a_run_is_not_resumed_with_other_parameters(folder: Path) -> None:
    options = options_for(folder)
    finetune(small_net(), options, callback=StopAt(2, signal.SIGTERM))
    model = small_net()
    model.stem.requires_grad_(False)
    with pytest.raises(InputError, match=r"other parameters: stem\.bias, stem\.weight, now frozen\.(.|\n)*a new run"):
        finetune(model, options, resume=True)
    assert finetune(model.requires_grad_(True), options, resume=True).epochs == 3
