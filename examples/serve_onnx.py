"""Name the classes of images by an exported network, without torch: serve_onnx.py MODEL.onnx IMAGE ..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepared(path, spec):
    """The image as the network was trained: [1, C, H, W]. spec: the metadata of the file."""
    channels, height, width = spec["size"]
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":
        sys.exit(f"{path} has more than 8 bits a value. Images have 8 here. Try: save it with 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    wide, tall = (int(side / spec["crop_fraction"] + 1e-6) for side in (width, height))  # what the image covers
    if tall == wide:
        size = [tall * side // min(image.size) for side in image.size]
    else:
        scale = max(wide / image.width, tall / image.height)
        size = [max(wide, round(image.width * scale)), max(tall, round(image.height * scale))]
    image = image.resize(size, Image.Resampling[spec["interpolation"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    normal = (pixels.reshape(height, width, channels) - np.float32(spec["mean"])) / np.float32(spec["std"])
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    spec = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    for path in sys.argv[2:]:
        logits = session.run(None, {"images": prepared(path, spec)})[0][0]
        print(path, spec["classes"][logits.argmax()] if spec["classes"] else logits.argmax())
