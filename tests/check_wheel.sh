#!/bin/sh
# check_wheel.sh DIST PYTHON: install the wheel of DIST into a new environment, whose torch and tests' tools are those
# of PYTHON, and run the tests of the kernels against it, away from the sources.
set -eu
dist=$1
python=$2
wheel=$(ls "$dist"/*.whl)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/env"
fresh="$folder/env/bin/python"
site=$("$fresh" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$fresh" -m pip install --quiet --no-deps "$wheel"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/torch.pth"
cp -r tests pyproject.toml "$folder"
cd "$folder"
"$fresh" - <<'CHECK'
import torch

import condconv_surgery as cs

print(f"{cs.__file__}: torch {torch.__version__}, {cs.native.describe()}")
assert "site-packages" in cs.__file__
assert cs.native.is_enabled()
CHECK
"$fresh" -m pytest -q -p no:cacheprovider tests/ops/test_cpp_backend.py tests/ops/test_cpp_routing.py \
	tests/ops/test_cpp_operators.py tests/ops/test_cpp_build.py
