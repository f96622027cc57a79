"""Build the C++ kernels with the package where that is possible; everything else stands in ``pyproject.toml``.

Without g++ 12, torch or Linux on x86_64 the package is installed without them, and computes the same by torch.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "condconv_surgery/ops/backends/cpp"

spec = importlib.util.spec_from_file_location("build_kernels", Path(__file__).parent / FOLDER / "build_kernels.py")
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """One library, which is not a module of Python: no version of Python is part of its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{Path(*fullname.split('.'))}.so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            if kernels.is_current(kernels.LIBRARY):  # of an editable installation
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(kernels.LIBRARY, target)
            else:
                kernels.build(target)
        except kernels.BuildError as reason:
            self.warn(f"the C++ kernels are not built: {reason}")


class TagOfTheKernels(bdist_wheel):
    """A wheel with the kernels is for one platform, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).rglob(kernels.LIBRARY.name)) if self.bdist_dir else False
        return ("py3", "none", super().get_tag()[2] if built else "any")


def extensions() -> list[Extension]:
    """The library, or nothing where it cannot be built."""
    try:
        kernels.check()
    except kernels.BuildError as reason:
        logging.getLogger(__name__).warning("The C++ kernels are not built: %s.", reason)
        return []
    files = sorted(str(path.relative_to(Path.cwd())) for path in kernels.SOURCES.glob("*.*"))
    return [Extension(f"{FOLDER.replace('/', '.')}.kernels", files, optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagOfTheKernels})
