"""A network of a script or notebook: its file says how another process loads it, and so does a run before it starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import InputSpec, TrainingOptions
from condconv_surgery.training.monitor.opening_notes import opening_notes
from tests.small_networks import SmallNet

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(SmallNet):
    pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(Net, "__module__", "__main__")  # as in the script itself
    monkeypatch.setattr(sys.modules["__main__"], "Net", Net, raising=False)
    return cs.convert(Net(), cs.CondConv(experts=2), example=EXAMPLE).model.eval()


@pytest.mark.parametrize("load", [cs.load, load_model])
def test_the_advice_for_a_file_of_a_script_works(load: object, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    cs.save(model, path)
    with pytest.raises(InputError, match=r"names __main__\.Net, a class of the script") as caught:
        load(path)
    assert caught.value.fix == f'condconv_surgery.load("{path}", model=Net())'
    loaded = eval(caught.value.fix, {"condconv_surgery": cs, "Net": Net})
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))


def test_a_run_says_how_its_files_load(model: nn.Module) -> None:
    notes = opening_notes(model, InputSpec(), TrainingOptions(), {}, steps=1)
    assert "The files of this run need load(path, model=MyNet()): __main__.Net is of this script." in notes
    plain = cs.convert(SmallNet(), cs.CondConv(experts=2), example=EXAMPLE).model
    assert not any("model=MyNet()" in note for note in opening_notes(plain, InputSpec(), TrainingOptions(), {}, 1))
