"""What kind of file is this, and reading its tensors without running it.

``torch.load`` answers many a wrong file with a misleading message (one advises ``weights_only=False``), so the bytes
are looked at first and every kind is answered with what it is and what to do.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from condconv_surgery.errors import DamagedFileError, InputError

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model_state", "model", "net", "weights")
"""Keys under which training scripts keep the weights, the averaged ones first."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and wrappers put before every name."""

MAX_RATIO = 200
"""A zip that unpacks to more than this many times its size is not a checkpoint."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.pt``, ``.pth`` or ``.safetensors`` file, without wrappers' prefixes.

    Raises ``InputError`` for a file of another kind and ``DamagedFileError`` for a broken one, each in words.
    """
    kind = sniff(path)
    if kind in _REFUSALS:
        allowed, fix = _REFUSALS[kind]
        raise InputError(f"{path} is {kind}.", allowed, fix.format(path=path))
    content = _load_safetensors(path) if kind == "safetensors" else _load_pickle(path)
    return _without_prefixes(_find_state(content, path))


def sniff(path: Path) -> str:
    """What the file is, in words: ``"a torch file"``, ``"safetensors"``, or one of the kinds that are refused."""
    if not path.exists():
        raise InputError(f"{path} does not exist.", "A model file is needed.", f"ls {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "A model file is needed.", f"{path}/model.pt")
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    if head[:1] == b"\x80" or head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        return "a torch file"
    if head.lstrip()[:1] == b"<":
        return AN_HTML_PAGE
    if b"\x00" not in head and _is_text(head):
        return "a text file"
    if path.suffix in (".pb", ".tflite") or b"saved_model" in head or b"TFL3" in head[:16]:
        return "a TensorFlow model"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and (b"onnx" in head or b"pytorch" in head)):
        return "an ONNX model"
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
        return "a torch file"
    return "a file of unknown kind"


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DamagedFileError(
            f"{path} is a torch file cut short: {error}.",
            "It must be whole: its directory stands at the end.",
            "copy or download it again, and compare the size",
        ) from error
    names = [entry.filename for entry in entries]
    if sum(entry.file_size for entry in entries) > MAX_RATIO * max(path.stat().st_size, 1):
        return "a zip that unpacks to far more than a checkpoint can"
    leaves = {name.partition("/")[2] for name in names}
    if "constants.pkl" in leaves or any(name.startswith("code/") for name in leaves):
        return "a TorchScript archive"
    if any(name.endswith(_PROGRAM) for name in names):
        return "an exported program (.pt2)"
    if "data.pkl" in leaves:
        return "a torch file"
    if any(name.endswith((".keras", "config.json")) for name in names):
        return "a Keras model"
    return "a zip archive that is no checkpoint"


AN_HTML_PAGE = "an HTML or XML page, perhaps an error page saved under a model's name"
_PROGRAM = ("archive_format", "models/model.json", "serialized_exported_program.json")
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)

_WANTED = "A state dict (.pt, .pth, .safetensors) of a torchvision, timm or your own model is needed."
_REFUSALS = {
    "an empty file": (_WANTED, "copy or download it again"),
    AN_HTML_PAGE: (
        _WANTED,
        "download it again: less {path}",
    ),
    "a text file": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
    "a TorchScript archive": (
        "A scripted or traced module has no layers left to exchange. " + _WANTED,
        "torch.save(torch.jit.load('{path}').state_dict(), 'model.pt') where you trust it",
    ),
    "an exported program (.pt2)": (
        "An exported program has no layers left to exchange. " + _WANTED,
        "torch.save(model.state_dict(), 'model.pt') where the model was exported",
    ),
    "a zip that unpacks to far more than a checkpoint can": (_WANTED, "another file"),
    "a zip archive that is no checkpoint": (_WANTED, "unzip it first, and give the checkpoint inside"),
    "a Keras model": ("Only PyTorch models have torch layers. " + _WANTED, "the PyTorch version of the model"),
    "an HDF5 file (Keras)": ("Only PyTorch models have torch layers. " + _WANTED, "the PyTorch version of the model"),
    "a TensorFlow model": ("Only PyTorch models have torch layers. " + _WANTED, "the PyTorch version of the model"),
    "an ONNX model": ("ONNX has no PyTorch modules to exchange. " + _WANTED, "the PyTorch model it was exported from"),
    "a Git LFS pointer, not the file itself": (_WANTED, "git lfs pull"),
    "a gzip archive": (_WANTED, "gunzip or tar xzf it first"),
    "a bzip2 archive": (_WANTED, "unpack it first"),
    "a 7z archive": (_WANTED, "unpack it first"),
    "a NumPy array": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
    "a picture": (
        "MODEL comes first, pictures with --data. " + _WANTED,
        "condconv finetune MODEL --data FOLDER -o RUN",
    ),
    "a file of unknown kind": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
}


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as safetensors: {error}.", "It must be whole.", "copy or download it again"
        ) from error


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _forbidden(path, error) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, AssertionError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(
            f"{path} is a torch file that cannot be read: {first}",
            "It must be whole, and written by torch.save.",
            "copy or download it again",
        ) from error


def _forbidden(path: Path, error: Exception) -> InputError:
    """The file names objects other than tensors: a pickled module, or a training dict with its options."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip of torch's own
        names = []
    if not names:
        return InputError(
            f"{path} is a pickle that holds more than tensors.",
            "It would have to run code to be read, so it is not.",
            "torch.save(model.state_dict(), 'model.pt') where you trust the file",
        )
    shown = ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
    return InputError(
        f"{path} is a pickled object, not a state dict: it names {shown}.",
        "Only tensors are read; nothing in a file is run.",
        "torch.save(model.state_dict(), 'model.pt') where the model was made, then --arch if it is not recognised",
    )


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
        for nest in NESTS:
            if isinstance(content.get(nest), dict):
                return _find_state(content[nest], path)
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if len(tensors) > len(content) / 2:
            return tensors
    if isinstance(content, dict):
        what = f"keys {', '.join(map(str, list(content)[:6]))}" if content else "an empty dict"
    else:
        what = f"a {type(content).__name__}"
    raise InputError(
        f"{path} holds no state dict: {what}.",
        f"The weights must be the whole file, or under one of: {', '.join(NESTS)}.",
        "torch.save(model.state_dict(), 'model.pt')",
    )


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut in two at the end
    return True
