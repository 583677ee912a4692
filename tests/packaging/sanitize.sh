#!/bin/sh
# The codec's tests on a C++ core built with AddressSanitizer, UBSan and the C++ library's own bounds checks, in a new
# environment: golden vectors, properties, hostile bytes and the seeds of fuzzing, on every instruction set that this
# machine has, with threads too. Ends at the first finding, with the sanitizer's report.
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$BIN/python" -m venv "$scratch/venv"
CXXFLAGS="-D_GLIBCXX_ASSERTIONS -fsanitize=float-cast-overflow" \
    "$scratch/venv/bin/pip" install --quiet --disable-pip-version-check -C cmake.define.KVSTORE_SANITIZE=ON \
    -C build-dir="$scratch/build" . pytest pytest-asyncio pytest-timeout hypothesis
# The installed package is under test, not the checkout's.
cp -r tests pyproject.toml "$scratch"
cd "$scratch"
# Python is not built with the sanitizer: its runtime is loaded first, and what Python leaks at exit is its own
# affair. Output is not captured, because a finding ends the process. test_identity starts processes without the
# runtime, and tests no C++.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    venv/bin/pytest -q -s tests/unit/codec tests/fuzz --ignore=tests/unit/codec/test_identity.py
