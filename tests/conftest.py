from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from condconv_surgery.reporting import Report

if not torch.cuda.is_available():  # before Triton is imported: its kernels are interpreted then
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = ["layers/outside_variant.py"]
"""Importing it, as the search for doctests does, would register its variant for all tests."""

INTEGRATIONS = Path(__file__).parent / "integrations"

Run = Callable[..., tuple[int, str, str]]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A test file of ``integrations/`` imports packages that only ``make integrations`` installs."""
    return True if collection_path == INTEGRATIONS and "integrations" not in config.option.markexpr else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if INTEGRATIONS in item.path.parents:
        item.add_marker(pytest.mark.integrations)


@pytest.fixture
def condconv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, stdout, stderr."""
    from condconv_surgery.cli import main as command_line

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["condconv", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            command_line.run()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run Triton's kernels on the CPU by its interpreter, which is requested above, and not the C++ ones."""
    from condconv_surgery.native import kernels
    from condconv_surgery.ops.backends.triton import availability

    if torch.cuda.is_available():
        pytest.skip("compiled here")
    monkeypatch.setattr(availability, "is_here", lambda device: True)
    with kernels(on=False):
        yield


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a small converted network with images."""
    from tests.measured_report import measure

    return measure(tmp_path_factory.mktemp("measured"))
