"""Malicious files, and files of another kind than their names: the exit code and message for each.

``python -m tests.hostile_files FOLDER`` writes them. Each that can run a command would create the file ``ran`` beside
itself.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.task.distillation
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from condconv_surgery.models.artifact.container import MAGIC
from condconv_surgery.recipe import Recipe
from condconv_surgery.runtime.tensor_hash import hash_tensors


@dataclass(frozen=True)
class Hostile:
    """``write`` makes the file; the command must exit with ``code`` and print ``message`` (a regular expression)."""

    name: str
    code: int
    message: str
    write: Callable[[Path], None]


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def saved(content: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(content(path.with_name("ran")), path)


def raw(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def recipe(**changes: Any) -> Callable[[Path], None]:
    """An artifact whose recipe has the given values."""

    def write(path: Path) -> None:
        text = json.dumps({**Recipe().to_dict(), **changes})
        artifact(path, recipe=text)

    return write


def skeleton(row: dict[str, Any]) -> Callable[[Path], None]:
    """An artifact that describes its own modules."""
    empty = {"state": {}, "parameters": {}, "buffers": {}, "transient": [], "children": {}}
    return lambda path: artifact(path, skeleton=json.dumps([{"class": LINEAR, **empty, **row}]))


def artifact(path: Path, **metadata: str) -> None:
    tensors = {"weight": torch.zeros(2, 2)}
    own = {
        "format": MAGIC,
        "recipe": json.dumps(Recipe().to_dict()),
        "aliases": "{}",
        "tensors_sha256": hash_tensors(tensors, headers=False),
    }
    save_file(tensors, path, {**own, **metadata})


def module_with(**attributes: Any) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[1].__dict__.update(attributes)
    return model


def cyclic_module() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model._modules["again"] = model
    return model


def module_of_text() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model._modules["1"] = "not a module"  # type: ignore[assignment]
    return model


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


def truncated(path: Path) -> None:
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def hdf5(path: Path) -> None:
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))


LINEAR = "torch.nn.modules.linear.Linear"
OS_SYSTEM = f"{os.system.__module__}.system"
COMMANDS = r"holds commands"
RAN = "ran = open('{}', 'w')"

HOSTILE = [
    Hostile("os_system.pt", 2, COMMANDS, saved(lambda ran: Calls(os.system, f"touch {ran}"))),
    Hostile("os_system_in_state.pt", 2, COMMANDS, saved(lambda ran: {"state_dict": Calls(os.system, f"touch {ran}")})),
    Hostile("eval.pt", 2, COMMANDS, saved(lambda ran: Calls(builtins.eval, f"open({str(ran)!r}, 'w')"))),
    Hostile("exec.pt", 2, COMMANDS, saved(lambda ran: Calls(builtins.exec, f"open({str(ran)!r}, 'w')"))),
    Hostile("getattr.pt", 2, COMMANDS, saved(lambda ran: Calls(builtins.getattr, nn.Conv2d(1, 1, 1), "forward"))),
    Hostile("open.pt", 2, COMMANDS, saved(lambda ran: Calls(open, str(ran), "w"))),
    Hostile("torch_load.pt", 2, COMMANDS, saved(lambda ran: Calls(torch.load, str(ran)))),
    Hostile("hub.pt", 2, COMMANDS, saved(lambda ran: Calls(torch.hub.load, "owner/repository", "model"))),
    Hostile(
        "partial_of_system.pt",
        2,
        COMMANDS,
        saved(lambda ran: module_with(forward=functools.partial(os.system, f"touch {ran}"))),
    ),
    Hostile(
        "downloading_dataset.pt",
        2,
        COMMANDS,
        saved(lambda ran: Calls(torchvision.datasets.MNIST, str(ran), True, None, None, True)),
    ),
    Hostile(
        "downloading_module.pt",
        2,
        COMMANDS,
        saved(lambda ran: Calls(timm.task.distillation.DistillationTeacher, "resnet18")),
    ),
    Hostile("allowed_class_bad_arguments.pt", 1, "cannot be read", saved(lambda ran: Calls(nn.Conv2d, "a", "b", "c"))),
    Hostile(
        "allowed_class_forbidden_argument.pt",
        2,
        COMMANDS,
        saved(lambda ran: Calls(torchvision.ops.MLP, 3, [3], Calls(os.system, f"touch {ran}"))),
    ),
    Hostile("cyclic_module.pt", 1, "contains itself", saved(lambda ran: cyclic_module())),
    Hostile("module_of_text.pt", 1, "not a Module", saved(lambda ran: module_of_text())),
    Hostile("unknown_package.pt", 2, "--trust tests", saved(lambda ran: {"options": Hostile("", 0, "", bomb)})),
    Hostile("namespace.pt", 2, "--trust argparse", saved(lambda ran: {"args": argparse.Namespace(lr=1), "model": {}})),
    Hostile("raw_pickle.pkl", 2, "would have to run code", lambda path: raw(plain_pickle(path))(path)),
    Hostile("bomb.pt", 2, "unpacks to far more", bomb),
    Hostile("truncated.pt", 1, "cut short", truncated),
    Hostile("empty.pt", 2, "is an empty file", raw(b"")),
    Hostile("page.pt", 2, "HTML", raw(b"<!doctype html><title>404</title>")),
    Hostile("pointer.pt", 2, "git lfs pull", raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")),
    Hostile("keras.h5", 2, "HDF5", hdf5),
    Hostile("noise.pt", 1, "cannot be read", raw(bytes(range(256)) * 8)),
    Hostile("huge_header.safetensors", 1, "cannot be read as safetensors", raw(struct.pack("<Q", 2**62) + b"{}")),
    Hostile("negative_header.safetensors", 1, "cannot be read as safetensors", raw(struct.pack("<q", -1) + b"{}")),
    Hostile("no_json_header.safetensors", 1, "cannot be read as safetensors", raw(struct.pack("<Q", 9) + b"{'a': 1}!")),
    Hostile("no_json_recipe.safetensors", 1, "recipe is not JSON", lambda path: artifact(path, recipe="{{{")),
    Hostile("deep_recipe.safetensors", 1, "recipe is not JSON", lambda path: artifact(path, recipe="[" * 100_000)),
    Hostile("list_recipe.safetensors", 1, "recipe is not the JSON", lambda path: artifact(path, recipe="[]")),
    Hostile("newer_recipe.safetensors", 1, "pip install --upgrade", recipe(format=99)),
    Hostile("bad_digest.safetensors", 1, "not the ones that were written", lambda p: artifact(p, tensors_sha256="0")),
    Hostile("alias_to_nowhere.safetensors", 1, "alias", lambda path: artifact(path, aliases='{"a": "b"}')),
    Hostile("alias_to_list.safetensors", 1, "alias", lambda path: artifact(path, aliases='{"a": []}')),
    Hostile(
        "factory_system.safetensors",
        2,
        "os:system",
        recipe(source={"name": "os:system", "options": {"command": "touch ran"}}),
    ),
    Hostile("factory_path.safetensors", 2, "--trust", recipe(source={"name": "../../evil:run", "options": {}})),
    Hostile("factory_empty.safetensors", 2, "--trust", recipe(source={"name": ":", "options": {}})),
    Hostile("factory_file.safetensors", 2, "Unknown", recipe(source={"name": "torchvision:../evil", "options": {}})),
    Hostile(
        "huge_classes.safetensors",
        1,
        "a width of 1000000000000, the largest",
        recipe(source={"name": "torchvision:resnet18", "options": {"num_classes": 10**12}}),
    ),
    Hostile(
        "huge_head.safetensors",
        1,
        "a width of 1000000000000, the largest",
        recipe(source={"name": "torchvision:resnet18", "options": {}}, heads={"fc": 10**12}),
    ),
    Hostile(
        "layer_without_name.safetensors",
        1,
        "does not fit its own source",
        recipe(
            source={"name": "torchvision:resnet18", "options": {}},
            layers=[{"names": [], "variant": {"kind": "condconv", "experts": 2}, "linear": False}],
        ),
    ),
    Hostile("skeleton_system.safetensors", 2, COMMANDS, skeleton({"class": OS_SYSTEM})),
    Hostile("skeleton_no_module.safetensors", 2, "not a module", skeleton({"class": "collections.OrderedDict"})),
    Hostile("skeleton_forward.safetensors", 2, COMMANDS, skeleton({"state": {"forward": {"name": OS_SYSTEM}}})),
    Hostile(
        "skeleton_partial.safetensors",
        2,
        COMMANDS,
        skeleton({"state": {"forward": {"partial": [{"name": OS_SYSTEM}, ["touch ran"], {"dict": []}]}}}),
    ),
    Hostile("skeleton_dunder.safetensors", 1, "cannot be read", skeleton({"state": {"__class__": 1}})),
    Hostile("skeleton_method.safetensors", 1, "cannot be read", skeleton({"state": {"x": {"method": [0, "__del__"]}}})),
    Hostile("skeleton_kind.safetensors", 1, "cannot be read", skeleton({"state": {"x": {"call": ["os.system"]}}})),
    Hostile("skeleton_child.safetensors", 1, "cannot be read", skeleton({"children": {"a": 7}})),
    Hostile("skeleton_itself.safetensors", 1, "contains itself", skeleton({"children": {"a": 0}})),
    Hostile(
        "skeleton_huge.safetensors",
        1,
        "cannot be read",
        skeleton({"parameters": {"weight": [0, [10**6, 10**9], "float32"]}}),
    ),
    Hostile("skeleton_lacks.safetensors", 1, "it has 'weight', which the model lacks", skeleton({})),
]


def plain_pickle(path: Path) -> bytes:
    return pickle.dumps(Calls(os.system, f"touch {path.with_name('ran')}"), protocol=2)


def write_all(folder: Path) -> None:
    """Every hostile file into a folder of its own name, so that what it leaves behind is seen."""
    for hostile in HOSTILE:
        place = folder / hostile.name
        place.mkdir(parents=True, exist_ok=True)
        hostile.write(place / hostile.name)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
