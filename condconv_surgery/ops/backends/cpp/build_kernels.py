"""Compile the kernels to one library: for every x86 processor with AVX2, every torch from 2.10 on and every Python.

Only the standard library is imported: ``setup.py`` runs this file before anything is installed. Of torch only the
headers of its stable ABI are read, so ``pip install`` finds them although it builds in an environment without torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).with_name("source")
LIBRARY = Path(__file__).with_name("kernels.so")
"""Where the installation puts it."""

OLDEST_TORCH = (2, 10)
OLDEST_GCC = 12

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


class BuildError(Exception):
    """Why the kernels cannot be compiled here: one line."""


def check() -> None:
    """Raise ``BuildError`` where ``build`` cannot work."""
    _compiler()
    torch_folder()


def build(target: Path) -> None:
    """Write the library to ``target``, in about 20 seconds of one core. Raises ``BuildError``.

    It is compiled in a folder beside ``target`` and renamed, so that a process that is killed leaves nothing half-made.
    """
    compiler, torch = _compiler(), torch_folder()
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(folder, f"{source.stem}.o") for source in sources]
        flags = [*FLAGS, f'-DCONDCONV_SOURCES="{digest()}"', f"-I{torch / 'include'}"]
        commands = [[compiler, *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        library = Path(folder, target.name)
        _run([compiler, "-shared", *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu", "-s", "-o", str(library)])
        library.chmod(0o755)
        library.replace(target)


def digest() -> str:
    """Of the sources and flags: the library carries that of its own."""
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    return hashlib.sha256(b"".join([*(f.read_bytes() for f in files), repr(FLAGS).encode()])).hexdigest()[:12]


def is_current(library: Path) -> bool:
    """Whether ``library`` was built from these sources."""
    return library.exists() and digest().encode() in library.read_bytes()


def torch_folder() -> Path:
    """The folder of the torch of this environment, also from inside pip's build environment. Raises ``BuildError``."""
    spec = importlib.util.find_spec("torch")
    found = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for folder in [*found, *(Path(path, "torch") for path in paths)]:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            version = _torch_version(folder)
            if version < OLDEST_TORCH:
                raise BuildError("torch {}.{} is older than {}.{}".format(*version, *OLDEST_TORCH))
            return folder
    raise BuildError("torch is not installed")


def _torch_version(folder: Path) -> tuple[int, ...]:
    text = (folder / "version.py").read_text(encoding="utf-8")
    match = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0)


def _compiler() -> str:
    """g++ of a Linux on x86. Raises ``BuildError``."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise BuildError(f"they are for Linux on x86_64, this is {platform.system()} on {platform.machine()}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("g++ was not found")
    version = _run([compiler, "-dumpversion"]).split(".")[0]
    if not version.isdigit() or int(version) < OLDEST_GCC:
        raise BuildError(f"{Path(compiler).name} {version} is older than {OLDEST_GCC}")
    return compiler


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{Path(command[0]).name} failed"]
        raise BuildError(next((line for line in lines if "error:" in line), lines[0]))
    return done.stdout.strip()
