"""The advice of messages about runs that fail, are resumed or damaged, typed as ``test_advice`` types others."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from condconv_surgery.cli.main import app
from safetensors.torch import save_file
from typer.testing import CliRunner

from condconv_surgery.runtime.tensor_hash import hash_tensors
from condconv_surgery.training import run as run_module
from tests.cli.advice import advice_in, reason_of, require_help
from tests.cli.test_advice import NETS, here, nets, training
from tests.conftest import Run

__all__ = ["here"]

Commands = Callable[[], list[str]]
Change = Callable[[Path], object]

MORE_NETS = """
def frozen(): return TwoLayers().requires_grad_(False)
def nothing(): return None
def of_five():
    net = TwoLayers()
    net.fc = nn.Linear(8, 5)
    return net
def not_finite():
    net = TwoLayers()
    net.fc.weight.data[0, 0] = torch.nan
    return net
"""
RESUMED = ["finetune", "-o", "run", "--resume", "--epochs", "3"]
STATES = ("state.safetensors", "state.previous.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of two epochs, whose images lie beside it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "nets", raising=False)
        result = CliRunner().invoke(app, [*training()(), "--epochs", "2", "--set", "engine.save_every=2"])
        assert result.exit_code == 0, result.output
        patch.delitem(sys.modules, "nets")
        yield folder / "run"


@pytest.fixture
def place(here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with more networks, images and that run. Drawing takes longer than these runs."""
    monkeypatch.setattr(run_module, "draw_curves", lambda rows, path: None)
    with (here / "nets.py").open("a") as file:
        file.write(MORE_NETS)
    shutil.copytree(finished, "run")
    shutil.copytree(finished.parent / "images", "images")
    return here


def new(*flags: str, model: str = "nets:tiny") -> Commands:
    """A run in a new folder."""
    return lambda: ["finetune", model, *training()()[2:], *flags, "-o", "new"]


def taught_by(content: Callable[[], object]) -> Commands:
    def write() -> list[str]:
        torch.save(content(), "teacher.pt")
        return new("--distill", "teacher.pt")()

    return write


def by_another_teacher() -> list[str]:
    shutil.copytree("run", "OTHER")
    return new("--distill", "nets:of_five")()


def changed(change: Change, *command: str) -> Commands:
    """A command about the finished run after a change; without one the run is resumed."""

    def write() -> list[str]:
        change(Path("run"))
        return list(command or RESUMED)

    return write


def garbage(*names: str) -> Change:
    return lambda run: [(run / name).write_bytes(bytes(range(256)) * 4) for name in names]


def cut(*names: str) -> Change:
    return lambda run: [os.truncate(run / name, (run / name).stat().st_size // 2) for name in names]


def states(facts: dict[str, object], form: int = 1) -> Change:
    """States that are whole, with these facts."""

    def write(run: Path) -> None:
        tensors, text = {"x": torch.zeros(1)}, json.dumps(facts)
        metadata = {"facts": text, "format": f"{form}", "sha256": hash_tensors(tensors, prefix=text)}
        for name in STATES:
            save_file(tensors, run / name, metadata)

    return write


def a_folder(name: str) -> Change:
    def write(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return write


def as_it_is(run: Path) -> None:
    """No change."""


def without_an_image(run: Path) -> None:
    Path("images/class0/00.png").unlink()


MISTAKES: dict[str, Commands] = {
    "a rate that diverges": new("--lr", "1e8", "--epochs", "6"),
    "a rate that diverges in half precision": new("--lr", "1e8", "--epochs", "6", "--precision", "bf16"),
    "a rate beyond float32": new("--lr", "1e38"),
    "a rate that diverges in the folder of a run": lambda: [
        *new("--lr", "1e8", "--epochs", "6")()[:-1],
        "run",
        "--resume",
    ],
    "a teacher that is not there": new("--distill", "nothere.safetensors"),
    "a teacher of an unknown name": new("--distill", "torchvision:resnet81"),
    "a teacher without its library": new("--distill", "resnet18"),
    "a teacher whose function is not there": new("--distill", "nets:of_fiv"),
    "a teacher that is none": new("--distill", "nets:nothing"),
    "a folder as a teacher": new("--distill", "images"),
    "a teacher of a package that is not trusted": taught_by(lambda: nets().tiny()),  # type: ignore[attr-defined]
    "a teacher of other classes": by_another_teacher,
    "a teacher with a new head": lambda: [*by_another_teacher()[:1], "nets:of_five", *new("--distill", "start")()[2:]],
    "features of no layer": new("--distill", "start", "--set", 'distill.features=["bodi"]'),
    "all layers frozen": new("--freeze", "*"),
    "all layers frozen by their names": new("--freeze", "stem", "--freeze", "body", "--freeze", "fc"),
    "another rate on a resume": changed(as_it_is, *RESUMED, "--lr", "0.5"),
    "other options on a resume": changed(as_it_is, *RESUMED, "--lr", "0.5", "--batch-size", "6"),
    "another seed on a resume": changed(as_it_is, *RESUMED, "--set", "seed=3"),
    "an option that was not set on a resume": changed(as_it_is, *RESUMED, "--temperature", "30"),
    "layers frozen on a resume": changed(as_it_is, *RESUMED, "--freeze", "body"),
    "another model on a resume": changed(as_it_is, "finetune", "nets:scaled", *RESUMED[1:]),
    "a resume of no run": lambda: ["finetune", "-o", "nowhere", "--resume"],
    "a resume without a folder": lambda: ["finetune", "--resume"],
    "images that have changed": changed(without_an_image, *RESUMED, "--data", "images"),
    "images that have changed, their record damaged": changed(
        lambda run: (without_an_image(run), garbage("images.jsonl")(run)), *RESUMED, "--data", "images"
    ),
    "states of garbage": changed(garbage(*STATES)),
    "states cut short": changed(cut(*STATES)),
    "states of something else": changed(states({"a": 1})),
    "states of a newer version": changed(states({}, form=9)),
    "a recipe of garbage": changed(garbage("recipe.toml")),
    "a recipe that is gone": changed(lambda run: (run / "recipe.toml").unlink()),
    "a recipe with a typo": changed(lambda run: (run / "recipe.toml").write_text("[optimizer]\nlrr = 1\n")),
    "a folder in place of the lock": changed(a_folder("run.lock")),
    "a model of garbage": changed(garbage("best.safetensors"), "report", "run/best.safetensors", "--trust", "nets"),
    "a model cut short": changed(cut("last.safetensors"), "report", "run/last.safetensors", "--trust", "nets"),
    "a report by a damaged record": changed(
        cut("images.jsonl"), "report", "run/best.safetensors", "--data", "run", "--trust", "nets"
    ),
    "a report by a damaged recipe": changed(
        garbage("recipe.toml"), "report", "run/best.safetensors", "--data", "run", "--trust", "nets"
    ),
    "a check of a damaged run": changed(garbage("recipe.toml"), "check", "--data", "run"),
}

SAYS = {
    "a teacher of an unknown name": "--distill torchvision:resnet18",
    "a teacher whose function is not there": "--distill nets:of_five",
    "a teacher of a package that is not trusted": "--trust nets",
    "all layers frozen": "--freeze stem --freeze body",
    "another rate on a resume": "--lr 0.001, or a new run: condconv finetune --recipe run/recipe.toml --lr 0.5",
    "other options on a resume": "--batch-size 4 --lr 0.001, or",
    "an option that was not set on a resume": "leave --temperature out, or",
    "another model on a resume": "nets:tiny, or a new run",
    "a model of garbage": "run/last.safetensors",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_advice_helps(mistake: str, place: Path, condconv: Run) -> None:
    def completed(again: list[str]) -> list[str]:
        if again[:2] == ["finetune", "nets:tiny"] and "--batch-size" not in again and "--resume" not in again:
            again += ["--epochs", "1", "--image-size", "16", "--workers", "0"]
        return again

    require_help(condconv, MISTAKES[mistake](), SAYS.get(mistake, ""), completed)


def test_a_new_run_is_proposed_with_the_other_options(place: Path, condconv: Run) -> None:
    error = condconv(*RESUMED, "--lr", "0.5")[2]
    call = advice_in(error).partition("a new run: condconv ")[2]
    assert call == "finetune --recipe run/recipe.toml --lr 0.5 -o RUN"
    code, _, error = condconv(*call.split())
    assert code == 0, error
    assert "learning rate 0.5." in error


def test_weights_that_are_not_finite_are_no_matter_of_the_rate(place: Path, condconv: Run) -> None:
    code, _, error = condconv(*new(model="nets:not_finite")())
    assert (code, reason_of(error)) == (
        1,
        "The model has weights that are not finite before the first step: fc.weight.",
    )
    assert advice_in(error) == "the model from before they became so, an earlier checkpoint"


def test_a_model_that_is_frozen_where_it_is_made(place: Path, condconv: Run) -> None:
    code, _, error = condconv(*new(model="nets:frozen")())
    assert (code, advice_in(error)) == (2, "model.requires_grad_(True) where the model is made")
    with (place / "nets.py").open("a") as file:
        file.write("def thawed(): return frozen().requires_grad_(True)")
    sys.modules.pop("nets")
    assert condconv(*new(model="nets:thawed")())[0] == 0


def test_a_resume_goes_on_beside_damaged_files(place: Path, condconv: Run) -> None:
    garbage("state.safetensors", "metrics.jsonl", "images.jsonl", "data.json", "best.safetensors")(Path("run"))
    Path("run/run.lock").write_text('{"pid": [], "host": {}}')
    code, _, error = condconv(*RESUMED)
    assert code == 0, error
    assert "run/state.safetensors cannot be read: header too large. Resuming from the previous state." in error
    assert "run/metrics.jsonl is damaged: the rows of 1 of 1 epochs are lost." in error
    assert [json.loads(line)["epoch"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [2, 3]


@pytest.mark.parametrize("rows", [b"1\n[2]\n", b'{"a": 1}\n', b"", b'{"epoch": 1}\n\xff\n'], ids=str)
def test_rows_that_are_lost_are_counted(rows: bytes, place: Path, condconv: Run) -> None:
    Path("run/metrics.jsonl").write_bytes(rows)
    error = condconv(*RESUMED[:-2])[2]
    assert f"the rows of {1 if b'epoch' in rows else 2} of 2 epochs are lost" in error


def test_a_lock_of_another_host_is_free_after_a_time(place: Path, condconv: Run) -> None:
    lock = Path("run/run.lock")
    lock.write_text('{"pid": 7, "host": "elsewhere"}')
    code, _, error = condconv(*RESUMED)
    assert code == 2
    assert advice_in(error).endswith("or wait until it has ended, then --resume")
    os.utime(lock, (0, 0))
    code, _, error = condconv(*RESUMED)
    assert code == 0, error
    assert "The run of process 7 on elsewhere ended without freeing run/run.lock" in error


def test_a_resume_with_another_model_says_which_state_is_kept(place: Path, condconv: Run) -> None:
    error = condconv("finetune", "nets:scaled", *RESUMED[1:])[2]
    assert "The state after step 4 is kept." in error
    assert "removed since the run began" not in condconv(*RESUMED, "--set", "seed=3")[2]


def test_a_damaged_recipe_is_replaced_by_what_is_typed(place: Path, condconv: Run) -> None:
    garbage("recipe.toml")(Path("run"))
    error = condconv(*RESUMED)[2]
    assert advice_in(error) == "condconv finetune MODEL --data FOLDER -o run --resume, with the options of the run"
    code, _, error = condconv(*training()(), "--resume", "--epochs", "3", "--set", "engine.save_every=2")
    assert code == 0, error
    assert "run/recipe.toml cannot be read" in error
    assert "The options are those typed." in error
