"""Write scikit-learn's 1,797 handwritten digits as an image folder: DIGITS/0/0000.png ... DIGITS/9/1796.png."""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path) -> int:
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype("uint8")).convert("RGB")
        image.resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return len(digits.images)


if __name__ == "__main__":
    print(f"Wrote {write_digits(Path(sys.argv[1]))} images to {sys.argv[1]}")
