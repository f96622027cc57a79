"""stdout in another encoding than UTF-8, on a full disk, in a closed pipe, or closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from condconv_surgery.cli.main import run

from tests.images import write_images


def condconv(monkeypatch: pytest.MonkeyPatch, stdout: str, *arguments: str) -> int | str | None:
    """The exit code of a command in this process whose stdout is a file."""
    monkeypatch.setattr(sys, "argv", ["condconv", *arguments])
    monkeypatch.setattr(sys, "stdout", Path(stdout).open("w", encoding="ascii"))  # noqa: SIM115  # run() takes it over
    with pytest.raises(SystemExit) as end:
        run()
    sys.stdout.close()
    return end.value.code


def test_ascii(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", classes=2, each=4)
    (data / "class0/00.png").unlink()
    (data / "class0").rename(data / "été")
    assert condconv(monkeypatch, f"{tmp_path}/out", "check", "--data", f"{data}") == 0
    assert "smallest \\xe9t\\xe9 (2)" in (tmp_path / "out").read_text(encoding="ascii")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["finetune", "--print-recipe"]], ids=" ".join)
def test_a_full_disk(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert condconv(monkeypatch, "/dev/full", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: The output cannot be printed: No space left on device.")
    assert "each file that the command wrote before it is whole" in error


def test_a_full_disk_costs_no_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    arguments = ["report", "torchvision:squeezenet1_1", "--input-size", "64", "--json", "--weights", "none"]
    assert condconv(monkeypatch, "/dev/full", *arguments, "--html", f"{page}") == 1
    assert "</html>" in page.read_text(encoding="utf-8")
    assert "The output cannot be printed" in capsys.readouterr().err


def test_streams_that_the_shell_closed(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", classes=2, each=4)
    command = f'"{sys.executable}" -m condconv_surgery check --data "{data}" --json'
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for closed in (">&-", "2>&-"):
        done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, env=environment, check=False)
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr
    assert json.loads(done.stdout)["classes"] == ["class0", "class1"]
