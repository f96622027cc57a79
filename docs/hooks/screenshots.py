"""Screenshots of a report page: ``python docs/hooks/screenshots.py PAGE.html docs/images``. Needs Chromium."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

SHOTS = {
    "desktop": (1280, 1500, "light"),
    "desktop-dark": (1280, 1500, "dark"),
    "phone": (390, 1500, "light"),
    "phone-dark": (390, 1500, "dark"),
}
"""Width, height and colour scheme of each screenshot."""

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]


def take_screenshot(page: Path, image: Path, width: int, height: int, scheme: str) -> None:
    """In an iframe of ``width``: a Chromium window cannot be as narrow as a phone."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("No chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        address = page.resolve().as_uri()
        style = f"border:0;width:{width}px;height:{height}px"
        frame.write_text(f'<body style="margin:0"><iframe src="{address}" style="{style}"></iframe>', encoding="utf-8")
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        size = f"--window-size={max(width, 500)},{height + 100}"
        where = [f"--user-data-dir={folder}/profile", f"--screenshot={image.resolve()}", frame.as_uri()]
        subprocess.run([chromium, *FLAGS, *dark, size, *where], check=True, capture_output=True, timeout=120)
    with Image.open(image) as shot:
        shot.convert("RGB").crop((0, 0, width, height)).quantize(128).save(image, optimize=True)


def main(page: Path, folder: Path) -> None:
    """Every screenshot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height, scheme) in SHOTS.items():
        take_screenshot(page, folder / f"report-{name}.png", width, height, scheme)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
