"""The kind of a file, by its first bytes; nothing in it is run.

``torch.load`` raises misleading messages for many other files (one advises ``weights_only=False``), so the bytes are
read first, and the error for each kind says what the file is and what to do.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.checkpoints.foreign_files import AN_HTML_PAGE, BY_SUFFIX, REFUSALS

TORCH = "a torch file"
SAFETENSORS = "a safetensors file"
"""The two kinds that are read; all others are in ``foreign_files.REFUSALS``."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Of files of weights."""

INDEX = ".index.json"
"""The end of the name of the index of a checkpoint in several files."""

OTHER_OF_RUN = {"best.safetensors": "last.safetensors", "last.safetensors": "best.safetensors"}
"""The two models that a run of ``finetune`` writes."""

MAX_RATIO = 200
"""A zip that unpacks to more than this many times its size is not a checkpoint."""


def file_kind(path: Path) -> str:
    """The kind of the file: ``TORCH``, ``SAFETENSORS``, or one of the keys of ``foreign_files.REFUSALS``."""
    require_file(path)
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if kind := _raw_weights(path, head):
        return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    if not any(head):
        return "a file of zeros"
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return SAFETENSORS
    if head[:1] == b"\x80" or head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        return TORCH
    if head.lstrip()[:1] == b"<":
        return "an OpenVINO model" if b"<net " in head else AN_HTML_PAGE
    for kind, suffixes in BY_SUFFIX.items():
        if path.suffix in suffixes:
            return kind
    if b"\x00" not in head and _is_text(head):
        return "a text file"
    if b"saved_model" in head or b"TFL3" in head[:16]:
        return "a TensorFlow model"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and (b"onnx" in head or b"pytorch" in head)):
        return "an ONNX model"
    if path.suffix in SUFFIXES:
        return TORCH
    return "a file of unknown kind"


def require_file(path: Path) -> None:
    """Raise ``InputError`` when ``path`` does not exist or is a folder."""
    if not path.exists() and path.with_name(f"{path.name}.index").is_file():
        raise refusal(path, "a TensorFlow checkpoint")  # the name that TensorFlow gives to its files together
    if not path.exists():
        raise InputError(f"{path} does not exist.", "A model file is needed.", f"ls {path.parent}")
    if path.is_dir():
        _refuse_other_folder(path)
        found = model_files(path)
        fix = f"{found[0]}" if found else f"ls {path}, which has none"
        raise InputError(f"{path} is a folder.", f"A model file ({', '.join(SUFFIXES)}) is needed.", fix)


def instead_of(path: Path, otherwise: str) -> str:
    """What to do about a damaged file: take the other model of its run, where it is one; else ``otherwise``."""
    name = OTHER_OF_RUN.get(path.name)
    if name is None or not path.with_name(name).is_file():
        return otherwise
    return f"{path.with_name(name)}, of the same run"


def refusal(path: Path, kind: str) -> InputError:
    """The error for a file of a kind in ``foreign_files.REFUSALS``."""
    allowed, fix = REFUSALS[kind]
    return InputError(f"{path} is {kind}.", allowed, fix.format(path=path, stem=path.stem))


def _refuse_other_folder(path: Path) -> None:
    """Raise ``InputError`` for a folder that another program wrote as one model."""
    if (path / ".metadata").is_file():
        raise InputError(
            f"{path} is a folder of torch.distributed.checkpoint.",
            "Its parts are to be put together first, in a file.",
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pt, then model.pt",
        )
    if (path / "saved_model.pb").is_file():
        raise refusal(path, "a TensorFlow model")
    if not model_files(path) and any(map(_TENSORFLOW_NAME.search, (file.name for file in path.iterdir()))):
        raise refusal(path, "a TensorFlow checkpoint")
    if path.suffix == ".mlpackage":
        raise refusal(path, "a Core ML model")


def model_files(folder: Path) -> list[Path]:
    """The files of weights directly in ``folder``: those called best or model first, then the newest.

    Of a checkpoint in several files its index alone.
    """
    indices = sorted(folder.glob(f"*{INDEX}"))
    if indices:
        return indices
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES]
    return sorted(files, key=lambda path: (not path.stem.endswith(("best", "model")), -path.stat().st_mtime, path.name))


def _raw_weights(path: Path, head: bytes) -> str:
    """The kind of a file of weights whose bytes do not tell, by its name, its end and the file beside it."""
    if head.startswith(b"model_checkpoint_path:") or _TENSORFLOW_NAME.search(path.name) or _is_table(path):
        return "a TensorFlow checkpoint"
    if path.suffix == ".bin" and head[:1] != b"\x80":  # every pickle of torch begins so
        beside = {".xml": "the weights of an OpenVINO model", ".param": "the weights of an ncnn model"}
        return next((kind for suffix, kind in beside.items() if path.with_suffix(suffix).is_file()), "")
    return ""


def _is_table(path: Path) -> bool:
    """It ends like the tables in which TensorFlow keeps the weights, or their index."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - len(_TABLE), 0))
        return file.read() == _TABLE


def _zip_kind(path: Path) -> str:
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
        return TORCH
    if any(name.endswith((".keras", "config.json")) for name in names):
        return "a Keras model"
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)"
    return "a zip archive that is no checkpoint"


_TENSORFLOW_NAME = re.compile(r"\.data-\d{5}-of-\d{5}$|\.ckpt(-\d+)?\.(index|meta)$")
_TABLE = bytes.fromhex("57fb808b247547db")
_PROGRAM = ("archive_format", "models/model.json", "serialized_exported_program.json")
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"GGUF", "a GGUF file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
)


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut in two at the end
    return True
