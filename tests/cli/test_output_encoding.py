"""stdout in another encoding than UTF-8: what it cannot hold is escaped, and nothing crashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.images import write_images


def test_stdout_in_ascii(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", classes=2, each=4)
    (data / "class0/00.png").unlink()
    (data / "class0").rename(data / "été")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "condconv_surgery", "check", "--data", str(data)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"smallest \\xe9t\\xe9 (2)" in done.stdout
