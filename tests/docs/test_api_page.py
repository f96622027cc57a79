"""Every name on the page of the Python API is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import condconv_surgery as cs
from condconv_surgery import training

ROOT = Path(__file__).parents[2]
NAMES = re.findall(r"^::: (\S+)", (ROOT / "docs/reference/api.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_found(name: str) -> None:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            if not f"{error.name}".startswith("condconv_surgery"):
                pytest.skip(f"{error.name} is not installed")
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return
    pytest.fail(f"{name} cannot be imported")


def test_every_public_name_is_on_the_page() -> None:
    """But for the errors, whose module is there as a whole, and the version."""
    shown = {name.rpartition(".")[2] for name in NAMES} | set(dir(importlib.import_module("condconv_surgery.errors")))
    public = {name for name in (*cs.__all__, *training.__all__) if not name.startswith("_")}
    assert public - shown == set()
