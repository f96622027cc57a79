"""The path that a command writes, checked before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from condconv_surgery.errors import InputError


def writable(output: Path | None, suffix: str = ".safetensors") -> Path:
    """The output path, checked before any work is done."""
    if output is None:
        raise InputError("No output was named.", "-o names the file to write.", f"-o model.condconv{suffix}")
    if output.suffix != suffix:
        raise InputError(f"-o {output} does not end in {suffix}.", "It must.", f"-o {output.with_suffix(suffix)}")
    folder = output.parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"-o {output} cannot be written.", f"{folder} must be a folder that exists and is writable.", "another -o"
        )
    return output
