"""Builds the native targets with clang, under build/fuzz: only what changed is compiled again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "fuzz"


class CannotBuild(Exception):
    """One line that names the remedy."""


def build(core: Path | None = None) -> Path:
    """The folder with the programs. `core`: another folder of C++ to be fuzzed. Raises CannotBuild."""
    compiler = os.environ.get("CXX", "clang++")
    _require_libfuzzer(compiler)
    if shutil.which("cmake") is None:
        raise CannotBuild("cmake is missing: apt-get install cmake, or pip install cmake")
    FOLDER.mkdir(parents=True, exist_ok=True)
    _run(
        [sys.executable, "-m", "tests.fuzz.write_tables", str(FOLDER / "tables.inc")],
        "write the tables",
        HERE.parents[1],
    )
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DKVSTORE_FUZZ_TABLES={FOLDER}"]
    options += [f"-DKVSTORE_FUZZ_CORE={core.resolve()}"] if core else ["-UKVSTORE_FUZZ_CORE"]
    _run(["cmake", "-S", str(HERE / "native"), "-B", str(FOLDER), *options], "configure")
    _run(["cmake", "--build", str(FOLDER), "--parallel", str(os.cpu_count() or 1)], "compile")
    return FOLDER


def _require_libfuzzer(compiler: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "empty.cpp"
        source.write_text('extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n')
        command = [compiler, "-fsanitize=fuzzer,address,undefined", str(source), "-o", str(Path(scratch) / "empty")]
        if shutil.which(compiler) is None or subprocess.run(command, capture_output=True, check=False).returncode:
            raise CannotBuild(
                f"{compiler} with libFuzzer is missing: apt-get install clang (Debian, Ubuntu), or name one in CXX"
            )


def _run(command: list[str], what: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        raise CannotBuild(f"the native targets do not {what}: {(errors or lines or ['no output'])[0]}")
