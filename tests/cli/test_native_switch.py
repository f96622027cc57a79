"""The compiled kernels are used where they are built, and switched by a flag, by Python or by the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from condconv_surgery.cli import main as command_line
from typer.testing import CliRunner

import condconv_surgery as cs
from condconv_surgery.ops.backends.cpp import build_kernels


@pytest.mark.parametrize(("arguments", "expected"), [(["--native"], ["on"]), (["--no-native"], ["off"]), ([], [])])
def test_the_command_line_turns_it_on_and_off(
    arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr("condconv_surgery.native.enable", lambda: called.append("on"))
    monkeypatch.setattr("condconv_surgery.native.disable", lambda: called.append("off"))
    result = CliRunner().invoke(command_line.app, [*arguments, "convert", "no-such-file.pt"])
    assert result.exit_code != 0
    assert called == expected


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


@pytest.mark.parametrize("value", [None, "0"])
def test_an_installation_with_kernels_uses_them_unless_told_not_to(value: str | None) -> None:
    environment = {**os.environ, "CONDCONV_NATIVE": value or ""}
    code = "import condconv_surgery as cs, sys; print('torch' in sys.modules, cs.native.is_enabled())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    can = build_kernels.LIBRARY.exists() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    assert done.stdout == f"False {can and value is None}\n"
    assert done.stderr == ""


def test_switched_off_before_the_layers_are_imported_it_stays_off() -> None:
    code = "import condconv_surgery as cs; cs.native.disable(); cs.convert; print(cs.native.is_enabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("built", "value", "line"),
    [
        (True, "", "C++ kernels: built, for x86 with AVX2 or AVX-512"),
        (True, "0", "C++ kernels: off (CONDCONV_NATIVE=0)"),
        (False, "", "C++ kernels: not built, so PyTorch's operators compute everything"),
    ],
)
def test_the_version_says_whether_there_are_kernels(
    built: bool, value: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "kernels.so"
    if built:
        library.touch()
    monkeypatch.setattr(build_kernels, "LIBRARY", library)
    monkeypatch.setenv("CONDCONV_NATIVE", value)
    result = CliRunner().invoke(command_line.app, ["--version"])
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert first == f"condconv-surgery {cs.__version__}"
    assert second.startswith(line)
