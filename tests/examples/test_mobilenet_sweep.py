"""The sweep over widths and experts, for a few steps: points, an interruption, the figure, an image folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.emoji_packages import write_packages
from tests.images import write_images
from tests.training.forked import fresh_script

ROOT = Path(__file__).parents[2]


def sweep(folder: Path, *arguments: object) -> list[dict]:
    """Run the example with ``folder/out`` as its output; its points."""
    done = fresh_script(ROOT / "examples/mobilenet_sweep.py", *arguments, "-o", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "out/points.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_sweep_continues_where_it_was_and_draws(tmp_path: Path) -> None:
    small = ["--widths", 0.125, "--experts", 1, 2, "--base-length", 2, "--length", 2, "--classes", 5, "--scored", 256]
    arguments = [*write_packages(tmp_path), *small]
    first = sweep(tmp_path, *arguments, "--seeds", 1)
    base = (tmp_path / "out/base-x0.125.safetensors").read_bytes()
    both = sweep(tmp_path, *arguments, "--seeds", 2)
    assert both[:2] == first
    assert [(point["seed"], point["experts"]) for point in both] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert (tmp_path / "out/base-x0.125.safetensors").read_bytes() == base
    assert all(0 <= point["top1"] <= 1 for point in both)
    static, two = first
    assert two["macs"] - static["macs"] == two["macs_224"] - static["macs_224"] > 0, "mixing knows no resolution"
    assert two["parameters"] > 1.9 * (static["parameters"] - 20_000)
    for kind in ("png", "svg"):
        assert (tmp_path / f"out/mobilenet-sweep.{kind}").stat().st_size > 10_000
    with pytest.raises(AssertionError, match="Give the packages of emoji, or --imagenet FOLDER"):
        sweep(tmp_path)
    (tmp_path / "out/mobilenet-sweep.png").unlink()
    assert sweep(tmp_path, "--only-draw") == both
    assert (tmp_path / "out/mobilenet-sweep.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scratch", [True, False])
def test_the_command_for_imagenet_runs_on_a_folder(scratch: bool, tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / "images" / part, each=8, side=32)
    arguments = ["--imagenet", "images", "--widths", 0.25, "--experts", 1, 2, "--seeds", 1, "--size", 64]
    lengths = ["--base-length", 2, "--length", 1, "--batch", 8, "--workers", 1]
    points = sweep(tmp_path, *arguments, *lengths, *(["--scratch"] if scratch else []))
    assert [(point["experts"], point["length"]) for point in points] == [(n, 2 if scratch else 1) for n in (1, 2)]
    assert (tmp_path / "out/base-x0.25.safetensors").exists() is not scratch
    assert points[1]["macs_224"] > points[0]["macs_224"] > 40e6
