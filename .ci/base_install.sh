#!/usr/bin/env bash
# Installs qvit without extras into a new environment, as a device without PyTorch would have it, and runs a model there.
#
#     make base-install          or          PYTHON=.venv/bin/python .ci/base_install.sh
#
# The environment of PYTHON, with 'qvit[train,dev]', makes the model and what is expected of it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
out=$PWD/build/base_install
rm -rf "$out"
mkdir -p "$out"
"$python" .ci/engine_cases.py "$out/cases"
"$python" -m venv "$out/venv"
"$out/venv/bin/python" -m pip install --quiet --disable-pip-version-check .
cd "$out" # away from the working tree's qvit
venv/bin/python -c '
import importlib.util as util, sys
present = [name for name in ("torch", "timm", "torchvision", "sklearn") if util.find_spec(name)]
sys.exit(f"the base install brought {present}" if present else 0)'
venv/bin/python -c '
import pathlib, sys, qvit
sources = sorted(path.name for path in pathlib.Path(qvit.__file__).with_name("engines").joinpath("cuda", "src").glob("*.cu*"))
sys.exit(0 if {"gemm.cu", "warp.cuh"} <= set(sources) else f"of the CUDA sources the wheel has only {sources}")'
check=$OLDPWD/.ci/engine_check.py
venv/bin/python "$check" cases
venv/bin/python -c '
import numpy as np, pathlib
from PIL import Image
pixels = np.load("cases/w4a4.npz")["pixels"]
for i, image in enumerate(pixels):
    folder = pathlib.Path("images", f"{i:02d}")
    folder.mkdir(parents=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(folder / "image.png")
for i in range(len(pixels), 11):
    folder = pathlib.Path("images", f"{i:02d}")
    folder.mkdir(parents=True)
    Image.fromarray(pixels[0].transpose(1, 2, 0)).save(folder / "image.png")'
venv/bin/qvit predict cases/w4a4.qvit images/00/image.png images/01/image.png --top 1
venv/bin/qvit predict images/00/image.png # with the model that comes with the wheel
venv/bin/qvit eval cases/w4a4.qvit --data images
venv/bin/qvit inspect cases/w4a4.qvit > /dev/null
