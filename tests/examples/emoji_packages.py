"""Two small packages of emoji, laid out as npm's."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

CODES = [f"1F60{digit}" for digit in "0123456789"]


def write_packages(folder: Path, side: int = 64) -> list[Path]:
    """Ten faces of both vendors, a flag, and one that the second vendor does not draw."""
    files = []
    for number, vendor in enumerate(("google", "twitter")):
        rows = [{"unified": code, "category": "Smileys & Emotion"} for code in (*CODES, "1F700")]
        rows += [{"unified": "1F1E9", "category": "Flags"}]
        images = {}
        for index, row in enumerate(rows):
            row["image"] = f"{row['unified'].lower()}.png"
            row[f"has_img_{vendor}"] = row["unified"] != "1F700" or vendor == "google"
            pixels = torch.rand(4, side, side, generator=torch.Generator().manual_seed(100 * number + index))
            images[f"package/img/{vendor}/64/{row['image']}"] = png(pixels)
            images[f"package/img/{vendor}/sheets/{row['image']}"] = b"another size"
        files.append(folder / f"emoji-datasource-{vendor}-16.0.0.tgz")
        with tarfile.open(files[-1], "w:gz") as tar:
            for name, data in {**images, "package/emoji.json": json.dumps(rows).encode()}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return files


def png(pixels: torch.Tensor) -> bytes:
    out = io.BytesIO()
    to_pil_image(pixels, mode="RGBA").save(out, "PNG")
    return out.getvalue()
