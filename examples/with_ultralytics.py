"""Convert a YOLO, train it for a few steps, validate, export to ONNX and predict.

    pip install "condconv-surgery[ultralytics]"
    python examples/with_ultralytics.py FOLDER [yolo11n.pt]

FOLDER gets eight generated images (examples/shapes_data.py) and the run. Without a checkpoint the network is built
from its description, with random weights. All that is new in a script for YOLO is the line of `convert_yolo`.
"""

import sys
from pathlib import Path

from shapes_data import write_shapes
from ultralytics import YOLO

import condconv_surgery as cs
from condconv_surgery.integrations.ultralytics import convert_yolo
from condconv_surgery.layers import conditional_layers


def main(folder: Path, model: str = "yolo11n.yaml") -> None:
    data = write_shapes(folder / "shapes")
    yolo = convert_yolo(YOLO(model), cs.CondConv(experts=4))
    options = {"data": data, "imgsz": 96, "batch": 4, "workers": 0, "plots": False, "project": folder, "exist_ok": True}
    yolo.train(epochs=2, nbs=4, name="run", **options)  # nbs: images for one step of the optimizer
    print(f"conditional layers after training: {len(conditional_layers(yolo.model))}")
    print(f"mAP50-95: {yolo.val(name='val', **options).box.map:.3f}")
    file = yolo.export(format="onnx", dynamic=True, imgsz=96)
    found = YOLO(file, task="detect").predict(data.parent / "images", imgsz=96, conf=0.001, verbose=False)
    print(f"{file}: {len(found)} images in ONNX Runtime, {sum(len(one.boxes) for one in found)} boxes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
