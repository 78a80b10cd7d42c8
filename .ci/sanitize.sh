#!/usr/bin/env bash
# Builds the CPU engine with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests, and those that attack it.
#
#     make sanitize          or          PYTHON=.venv/bin/python .ci/sanitize.sh [pytest arguments]
#
# Needs GCC and an environment with 'qvit[train,dev]'. Everything lands in build/sanitize.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
out=$PWD/build/sanitize
rm -rf "$out"
mkdir -p "$out"

# An environment that sees the packages of the other one, but the sanitized build of qvit instead of the one installed there.
"$python" -m venv --without-pip "$out/venv"
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
own=$(site "$out/venv/bin/python")
site "$python" > "$own/other.pth"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$out" \
    --config-settings=cmake.define.QVIT_SANITIZE=ON .
"$python" -m zipfile -e "$out"/qvit-*.whl "$own"

# The tests run from a folder of their own, where the working tree's qvit is not found.
mkdir "$out/tree"
cp -r tests pyproject.toml "$out/tree"
cd "$out/tree"
export QVIT_DATA=${QVIT_DATA:-$out/../../../shared/data}
# Preloaded, since Python itself is not sanitized; libstdc++ too, so that its exceptions are seen. Python's leaks are not ours.
# No detect_stack_use_after_return: GCC misaligns 64-byte vectors on its fake stack (GCC PR 110027).
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:strict_string_checks=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONMALLOC=malloc
[ $# -gt 0 ] || set -- tests/engines/cpu tests/robustness
exec "$out/venv/bin/python" -X faulthandler -m pytest -p no:cacheprovider "$@"
