"""Every hostile file through the real command: nothing runs, nothing is written; a message and an exit code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("timm")

from condconv_surgery.cli.main import run

from condconv_surgery.errors import SurgeryError
from condconv_surgery.layers import conditional_like
from condconv_surgery.models.artifact.save_load import load, save
from condconv_surgery.recipe import ODConv
from tests.hostile_files import HOSTILE, Hostile


@pytest.mark.filterwarnings("ignore")  # torch warns while it writes some of these
@pytest.mark.parametrize(
    ("command", "hostile"),
    [*(("convert", hostile) for hostile in HOSTILE), *(("report", hostile) for hostile in HOSTILE[::5])],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_nothing_runs_and_nothing_is_written(
    command: str,
    hostile: Hostile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / hostile.name
    hostile.write(path)
    arguments = ["-o", "out.safetensors"] if command == "convert" else []
    monkeypatch.setattr(sys, "argv", ["condconv", command, str(path), *arguments])
    loaded = set(sys.modules)
    with pytest.raises(SystemExit) as ended:
        run()
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (hostile.code, "")
    assert re.search(hostile.message, output.err), output.err
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == [path]
    assert not {"evil", "antigravity"} & (set(sys.modules) - loaded)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 2)


WRONG: list[Any] = [
    None,
    True,
    -1,
    10**12,
    1.5,
    "",
    "../x",
    [],
    [[]],
    {},
    {"name": "os.system"},
    {"partial": [1, 2, 3]},
]


def leaves(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested JSON."""
    pairs = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    return [(data, key) for key, _ in pairs] + [found for _, value in pairs for found in leaves(value)]


@pytest.mark.parametrize("part", ["recipe", "skeleton", "aliases"])
def test_any_wrong_value_loads_or_raises_our_error(part: str, tmp_path: Path) -> None:
    """Each value of the metadata replaced by each wrong one: the file loads or a ``SurgeryError`` is raised."""
    path = tmp_path / "m.safetensors"
    model = Net()
    model.features[2].weight = nn.Parameter(model.features[2].weight)
    model.head.twin = model.head.weight  # type: ignore[assignment]  # a tied tensor, so that there is an alias
    layer = conditional_like(model.features[2], ODConv(experts=2))
    model.features[2] = layer
    save(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    data = json.loads(metadata[part])
    refused = 0
    for container, key in leaves(data):
        right = container[key]
        for wrong in WRONG:
            container[key] = wrong
            save_file(tensors, path, {**metadata, part: json.dumps(data)})
            try:
                load(path, trust=("tests",))
            except SurgeryError:
                refused += 1
        container[key] = right
    assert refused > 0
