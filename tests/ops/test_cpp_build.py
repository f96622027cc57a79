"""The library of kernels: built from these sources, and what is said where it cannot be."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from condconv_surgery import native
from condconv_surgery.errors import InputError
from condconv_surgery.ops.backends.cpp import build_kernels, load_kernels
from condconv_surgery.ops.backends.cpp.build_kernels import BuildError

needs_library = pytest.mark.skipif(not build_kernels.LIBRARY.exists(), reason="the kernels are not built")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@needs_library
def test_the_library_is_that_of_these_sources() -> None:
    """After a change of the sources: ``python setup.py build_ext --inplace``."""
    sources = ctypes.CDLL(str(build_kernels.LIBRARY)).condconv_sources
    sources.restype = ctypes.c_char_p
    assert sources().decode() == build_kernels.digest()
    assert build_kernels.is_current(build_kernels.LIBRARY)
    assert build_kernels.LIBRARY.stat().st_size < 5e6


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installation without kernels, and an empty cache."""
    monkeypatch.setattr(load_kernels, "LIBRARY", tmp_path / "kernels.so")
    monkeypatch.setattr(load_kernels, "_enabled", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CONDCONV_NATIVE", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    return tmp_path


def test_importing_compiles_nothing(without_library: Path) -> None:
    load_kernels.enable_by_default()
    assert not native.is_enabled()
    assert not native.is_built()
    assert list(without_library.iterdir()) == []


def test_a_library_that_does_not_load_is_a_warning(without_library: Path, caplog: pytest.LogCaptureFixture) -> None:
    (without_library / "kernels.so").write_bytes(b"not a library")
    load_kernels.enable_by_default()
    assert not native.is_enabled()
    assert "The native kernels do not load" in caplog.text


def test_no_compiler(without_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(InputError, match=r"g\+\+ was not found(.|\n)*g\+\+ 12 or newer, and torch"):
        native.enable()
    assert not native.is_enabled()


def test_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(BuildError, match=r"they are for Linux on x86_64, this is .* on aarch64"):
        build_kernels.check()


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(InputError, match=r"torch says DEFAULT(.|\n)*AVX2"):
        native.enable()


def make_torch(folder: Path, version: str) -> Path:
    """What the build looks for in an installed torch."""
    header = folder / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "torch"


@pytest.mark.parametrize(("version", "accepted"), [("2.10.0+cpu", True), ("2.9.1", False), ("1.13.0", False)])
def test_torch_is_found_from_an_isolated_build(
    version: str, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch cannot be imported, but lies in the environment that the package is installed into."""
    torch_here = make_torch(tmp_path, version)
    monkeypatch.setattr(build_kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_kernels.sysconfig, "get_path", lambda name: str(tmp_path))
    if accepted:
        assert build_kernels.torch_folder() == torch_here
    else:
        with pytest.raises(BuildError, match=r"torch \S+ is older than 2.10"):
            build_kernels.torch_folder()


def test_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_kernels.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(build_kernels.site, "getusersitepackages", lambda: str(tmp_path))
    with pytest.raises(BuildError, match="torch is not installed"):
        build_kernels.check()


@needs_compiler
def test_what_the_compiler_says_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "source"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int main() { return nothing; }\n")
    monkeypatch.setattr(build_kernels, "SOURCES", sources)
    with pytest.raises(BuildError, match=r"error: .nothing. was not declared"):
        build_kernels.build(tmp_path / "kernels.so")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
def test_a_wheel_that_cannot_be_compiled_has_no_library_and_is_for_every_platform(tmp_path: Path) -> None:
    """Also in a folder where a library was built before."""
    environment = {**os.environ, "CXX": "no-such-compiler"}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    root = Path(__file__).parents[2]
    tree = tmp_path / "tree"
    for folder in ("condconv_surgery", "cli"):
        shutil.copytree(root / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(root / name, tree)
    library = tree / "condconv_surgery" / "ops" / "backends" / "cpp" / "kernels.so"
    library.write_bytes(b"built before")
    subprocess.run([*build, str(tree)], env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "condconv_surgery/ops/backends/cpp/source/kernels.h" in names


COMPILER = """#!/bin/sh
case "$*" in
  -dumpversion) echo 13 ;;
  *-shared*) for target; do :; done; cp "{library}" "$target" ;;
esac
"""
"""Takes from the installation what it compiled by the same commands."""


@pytest.mark.slow
@needs_library
def test_an_installation_without_kernels_compiles_them_once(tmp_path: Path) -> None:
    """In a process of its own, which has not loaded those of the installation."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(library=build_kernels.LIBRARY))
    compiler.chmod(0o700)
    code = (
        "from pathlib import Path; from condconv_surgery.ops.backends.cpp import load_kernels as cpp; "
        "cpp.LIBRARY = Path('kernels.so').absolute(); from condconv_surgery import native; "
        "print(native.is_built(), native.is_enabled()); native.enable(); print(native.is_built(), native.is_enabled())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    for expected in ("False False\nTrue True\n", "True False\nTrue True\n"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == expected
        assert ("Compiling the native kernels, once" in done.stderr) == expected.startswith("False")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiler", "condconv_surgery"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
def test_no_function_that_files_share_has_wide_instructions(instructions: str, tmp_path: Path) -> None:
    """The linker keeps one copy of a shared (weak) function: one with AVX-512 would run on every processor."""
    compiled = tmp_path / "kernels.o"
    source = build_kernels.SOURCES / f"kernels_{instructions}.cpp"
    subprocess.run(["g++", *build_kernels.FLAGS, "-c", source, "-o", compiled], check=True)
    symbols = subprocess.run(["nm", "-C", compiled], check=True, capture_output=True, text=True).stdout
    assert [line for line in symbols.splitlines() if " W " in line] == []
    code = subprocess.run(["objdump", "-d", compiled], check=True, capture_output=True, text=True).stdout
    assert "%ymm" in code
    assert ("%zmm" in code) == (instructions == "avx512")
