#!/usr/bin/env bash
# Cross-compiles the CPU engine for aarch64 and checks it under qemu: the GEMM kernels by themselves, then whole models,
# code by code, with what the reference engine gives here. On NEON with dot products, and on the portable path.
#
#     make aarch64          or          PYTHON=.venv/bin/python .ci/aarch64.sh
#
# Needs Debian's g++-aarch64-linux-gnu, qemu-user and, for the interpreter that runs inside qemu, its arm64 packages:
#     dpkg --add-architecture arm64 && apt-get update && apt-get install g++-aarch64-linux-gnu qemu-user
# and an environment with 'qvit[train,dev]'. Everything lands in build/aarch64; nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
out=$PWD/build/aarch64
gxx=aarch64-linux-gnu-g++
src=qvit/engines/cpu/src
mkdir -p "$out"

echo "== GEMM kernels"
$gxx -std=c++17 -O3 -march=armv8.2-a+dotprod -I$src/gemm -c $src/gemm/gemm_neon.cpp -o "$out/gemm_neon.o"
$gxx -std=c++17 -O3 -I$src/gemm benchmarks/cpu_gemm.cpp $src/gemm/{gemm,packed_codes,gemm_generic}.cpp "$out/gemm_neon.o" \
    -static -pthread -o "$out/cpu_gemm"
qemu-aarch64 -cpu max "$out/cpu_gemm" --check         # with dot products
qemu-aarch64 -cpu cortex-a57 "$out/cpu_gemm" --check  # without: the portable kernels

echo "== A Python for aarch64"
version=$(apt-cache show python3:arm64 | sed -n 's/^Version: \([0-9]*\.[0-9]*\).*/\1/p' | head -1)
root=$out/root
if [ ! -x "$root/usr/bin/python$version" ]; then
    mkdir -p "$out/debs" "$root"
    (cd "$out/debs" && apt-get download -qq {"python$version-minimal","libpython$version-minimal","libpython$version-stdlib"}:arm64 \
        "libpython$version-dev:arm64" {zlib1g,libexpat1,libffi8,libbz2-1.0,liblzma5}:arm64)
    for package in "$out"/debs/*.deb; do dpkg -x "$package" "$root"; done
    "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --no-deps --python-version "$version" \
        --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --dest "$out/wheels" numpy safetensors pillow
    for wheel in "$out"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$out/site"; done
fi

echo "== The engine"
cmake -S . -B "$out/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=$gxx -DPython_EXECUTABLE="$python" -DPython_INCLUDE_DIR="$root/usr/include/python$version" \
    -DCMAKE_CXX_FLAGS="-I$root/usr/include" > "$out/cmake.log"
cmake --build "$out/build" -j2 > "$out/build.log"
# The package without what pip installs for this machine.
rm -rf "$out/site/qvit"
cp -r qvit "$out/site/qvit"
rm -f "$out"/site/qvit/engines/cpu/_native*
cp "$out"/build/_native*.so "$out/site/qvit/engines/cpu/_native.so"

echo "== Whole models"
"$python" .ci/engine_cases.py "$out/cases"
lib=$root/lib/aarch64-linux-gnu:$root/usr/lib/aarch64-linux-gnu
for isa in neon generic; do
    qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu -E "LD_LIBRARY_PATH=$lib" -E "PYTHONHOME=$root/usr" \
        -E "PYTHONPATH=$out/site" -E "QVIT_ISA=$isa" "$root/usr/bin/python$version" .ci/engine_check.py "$out/cases" $isa
done
