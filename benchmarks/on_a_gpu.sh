#!/bin/sh
# on_a_gpu.sh OUT: what waits for a GPU, in under ten minutes: the GPU tests, and networks in eager mode and as CUDA
# graphs against static ones. OUT gets JSON files, a log of each step, and summary.txt with their exit codes.
# PYTHON is the interpreter (default: python), LIMIT the seconds of a step (default: 140).
set -u
out=${1:?usage: on_a_gpu.sh OUT}
python=${PYTHON:-python}
mkdir -p "$out"

step() {
	name=$1
	shift
	timeout "${LIMIT:-140}" "$@" > "$out/$name.log" 2>&1
	echo "$name: exit $?" | tee -a "$out/summary.txt"
}

half="--device cuda --autocast bfloat16 --channels-last --out $out"
step device "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
step tests "$python" -m pytest -q -m cuda --junitxml "$out/cuda-tests.xml"
step eager "$python" -m benchmarks models --quick --models resnet18 --variants condconv4 odconv1 $half
step graphs "$python" -m benchmarks models --quick --models resnet18 --variants condconv4 odconv1 $half --clock graph
step memory "$python" -m benchmarks memory --models resnet18 --variants condconv4 $half
grep -c "exit 0" "$out/summary.txt"
