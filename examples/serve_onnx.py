"""Name the classes of images by an exported network, without torch: serve_onnx.py MODEL.onnx IMAGE ..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
spec = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
_, height, width = spec["size"]
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = int(max(height, width) / spec["crop_fraction"]) / min(image.size)  # the short side covers the crop
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    normal = (pixels - np.float32(spec["mean"])) / np.float32(spec["std"])
    logits = session.run(None, {"images": normal.transpose(2, 0, 1)[None]})[0][0]
    print(path, spec["classes"][logits.argmax()] if spec["classes"] else logits.argmax())
