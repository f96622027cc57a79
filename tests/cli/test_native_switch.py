"""The compiled kernels are enabled by a flag, by Python or by the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from condconv_surgery.cli import main as command_line
from typer.testing import CliRunner

import condconv_surgery as cs
from condconv_surgery.ops.backends import cpp


@pytest.mark.parametrize("arguments", [["--native"], []])
def test_the_command_line_turns_it_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("condconv_surgery.native.enable", lambda: called.append(True))
    monkeypatch.setattr("condconv_surgery.native.is_built", lambda: False)
    result = CliRunner().invoke(command_line.app, [*arguments, "convert", "no-such-file.pt"])
    assert result.exit_code != 0
    assert called == ([True] if arguments else [])
    assert ("Compiling" in result.output) == bool(called)


IMPORT = ["-c", "import condconv_surgery as cs; cs.convert"]
COMMAND = ["-m", "condconv_surgery", "convert", "torchvision:resnet18", "--weights", "none", "--dry-run"]


@pytest.mark.parametrize(("arguments", "value"), [(IMPORT, "1"), (IMPORT, "0"), (IMPORT, None), (COMMAND, "1")])
def test_the_environment_turns_it_on(arguments: list[str], value: str | None, tmp_path: Path) -> None:
    """In Python and on the command line; seen here by the error on a processor that cannot run the kernels."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "XDG_CACHE_HOME": f"{tmp_path}"}
    environment.pop("CONDCONV_NATIVE", None)
    if value is not None:
        environment["CONDCONV_NATIVE"] = value
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == (value == "1"), done.stderr
    assert ("cannot run on this processor (torch says DEFAULT)" in done.stderr) == (value == "1")


def test_the_switch_of_the_package() -> None:
    assert cs.native.is_enabled() == cpp.is_enabled()
    assert all(callable(getattr(cs.native, name)) for name in ("enable", "disable", "is_built"))
