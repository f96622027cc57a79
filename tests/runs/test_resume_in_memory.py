"""The same call with ``resume=True``: the object in memory is then the half-trained model, not the one at the start."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from condconv_surgery.recipe import CondConv
from condconv_surgery.training import finetune
from condconv_surgery.training.state.run_state import BEFORE, LAST, State, read_state, save_state
from tests.images import write_images
from tests.small_networks import small_net
from tests.training.test_training_run import StopAt, assert_same, options_for, weights

CASES = {
    "teacher": (3, {"distill": {"teacher": "start", "weight": 0.9}}),
    "feature maps of a teacher with a new head": (
        5,
        {"distill": {"teacher": "start", "weight": 0.0, "features": ["inner"], "feature_weight": 1.0}},
    ),
    "new head and warm routers": (5, {"layers": {"warm_routers": 2}}),
    "both": (3, {"layers": {"warm_routers": 1}, "distill": {"teacher": "start"}, "engine": {"ema": 0.9}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_object_of_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, case: str) -> None:
    folder = write_images(tmp_path / "data", each=7)
    classes, sections = CASES[case]
    whole, cut = (options_for(folder, name).updated(sections) for name in ("whole", "cut"))
    heads = finetune(small_net(CondConv(experts=2), classes=classes), whole).heads
    model = small_net(CondConv(experts=2), classes=classes)
    finetune(model, cut, callback=StopAt(2, signal.SIGINT))
    finetune(model, cut, callback=StopAt(6, signal.SIGINT), resume=True)
    assert finetune(model, cut, resume=True).heads == heads
    assert_same(weights(whole), weights(cut))


def test_an_older_state_resumes_with_the_model_from_the_start(tmp_path: Path) -> None:
    """One that names neither heads nor frozen parameters and holds no weights from the start."""
    folder = write_images(tmp_path / "data", each=7)
    sections = {"layers": {"warm_routers": 2}, "distill": {"teacher": "start", "weight": 0.0, "features": ["inner"]}}
    whole, cut = (options_for(folder, name).updated(sections) for name in ("whole", "cut"))
    finetune(small_net(CondConv(experts=2)), whole)
    finetune(small_net(CondConv(experts=2)), cut, callback=StopAt(2, signal.SIGINT))
    state = read_state(Path(cut.output) / LAST)
    facts = {name: fact for name, fact in state.facts.items() if name not in ("heads", "frozen")}
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("start.")}
    assert len(facts) < len(state.facts)
    assert len(tensors) < len(state.tensors)
    save_state(Path(cut.output), State(tensors, facts))
    (Path(cut.output) / BEFORE).unlink()
    finetune(small_net(CondConv(experts=2)), cut, resume=True)
    assert_same(weights(whole), weights(cut))
