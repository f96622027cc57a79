"""The kind of a file, by its first bytes; nothing in it is run.

``torch.load`` raises misleading messages for many other files (one advises ``weights_only=False``), so the bytes are
read first, and the error for each kind says what the file is and what to do.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from condconv_surgery.errors import DamagedFileError, InputError

TORCH = "a torch file"
SAFETENSORS = "a safetensors file"
"""The two kinds that are read; all others are in ``REFUSALS``."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Of files of weights."""

INDEX = ".index.json"
"""The end of the name of the index of a checkpoint in several files."""

MAX_RATIO = 200
"""A zip that unpacks to more than this many times its size is not a checkpoint."""


def file_kind(path: Path) -> str:
    """The kind of the file: ``TORCH``, ``SAFETENSORS``, or one of the keys of ``REFUSALS``."""
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
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return SAFETENSORS
    if head[:1] == b"\x80" or head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        return TORCH
    if head.lstrip()[:1] == b"<":
        return AN_HTML_PAGE
    if b"\x00" not in head and _is_text(head):
        return "a text file"
    if path.suffix in (".pb", ".tflite") or b"saved_model" in head or b"TFL3" in head[:16]:
        return "a TensorFlow model"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and (b"onnx" in head or b"pytorch" in head)):
        return "an ONNX model"
    if path.suffix in SUFFIXES:
        return TORCH
    return "a file of unknown kind"


def require_file(path: Path) -> None:
    """Raise ``InputError`` when ``path`` does not exist or is a folder."""
    if not path.exists():
        raise InputError(f"{path} does not exist.", "A model file is needed.", f"ls {path.parent}")
    if path.is_dir():
        found = model_files(path)
        fix = f"{found[0]}" if found else f"ls {path}, which has none"
        raise InputError(f"{path} is a folder.", f"A model file ({', '.join(SUFFIXES)}) is needed.", fix)


def model_files(folder: Path) -> list[Path]:
    """The files of weights directly in ``folder``: those called best or model first, then the newest.

    Of a checkpoint in several files its index alone.
    """
    indices = sorted(folder.glob(f"*{INDEX}"))
    if indices:
        return indices
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES]
    return sorted(files, key=lambda path: (not path.stem.endswith(("best", "model")), -path.stat().st_mtime, path.name))


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
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
)

_WANTED = "A state dict (.pt, .pth, .safetensors) of a torchvision, timm or your own model is needed."
REFUSALS = {
    "an empty file": (_WANTED, "copy or download it again"),
    AN_HTML_PAGE: (_WANTED, "download it again: less {path}"),
    "a text file": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
    "a TorchScript archive": (
        "A scripted or traced module has no layers left to replace. " + _WANTED,
        "torch.save(torch.jit.load('{path}').state_dict(), 'model.pt') where you trust it",
    ),
    "an exported program (.pt2)": (
        "An exported program has no layers left to replace. " + _WANTED,
        "torch.save(model.state_dict(), 'model.pt') where the model was exported",
    ),
    "a zip that unpacks to far more than a checkpoint can": (_WANTED, "another file"),
    "a zip archive that is no checkpoint": (_WANTED, "unzip it first, and give the checkpoint inside"),
    "a Keras model": ("Only PyTorch models have torch layers. " + _WANTED, "the PyTorch version of the model"),
    "an HDF5 file (Keras)": ("Only PyTorch models have torch layers. " + _WANTED, "the PyTorch version of the model"),
    "a TensorFlow model": ("Only PyTorch models have torch layers. " + _WANTED, "the PyTorch version of the model"),
    "an ONNX model": ("ONNX has no PyTorch modules to replace. " + _WANTED, "the PyTorch model it was exported from"),
    "a Git LFS pointer, not the file itself": (_WANTED, "git lfs pull"),
    "a gzip archive": (_WANTED, "gunzip or tar xzf it first"),
    "a bzip2 archive": (_WANTED, "unpack it first"),
    "a 7z archive": (_WANTED, "unpack it first"),
    "a NumPy array": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
    "an image": ("Images are not a model: they go into data=. " + _WANTED, 'data="FOLDER"'),
    "a file of unknown kind": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
}


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut in two at the end
    return True
