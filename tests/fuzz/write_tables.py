"""The codec's constant tables as C++ arrays, for the native targets: `python -m tests.fuzz.write_tables FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import tables
from kvstore_codec.reference.lossless import SYMBOL_COSTS


def write(path: Path) -> None:
    arrays: list[tuple[str, str, npt.NDArray[Any]]] = [
        ("u16", "kValues", tables.VALUES.freq),
        ("u16", "kDigits", tables.DIGITS.freq),
        ("float", "kShrinkage", tables.SHRINKAGE),
        ("double", "kThresholds", tables.SCALE_THRESHOLDS),
        ("double", "kVariances", tables.SCALE_VARIANCES),
        ("u16", "kExponents", tables.EXPONENTS.freq),
        ("i32", "kCosts", SYMBOL_COSTS),
    ]
    lines = [
        f"constexpr {kind} {name}[] = {{{', '.join(map(_literal, values.ravel()))}}};\n"
        for kind, name, values in arrays
    ]
    text = "".join(lines)
    if not path.exists() or path.read_text() != text:  # an unchanged file keeps its time, and what was built from it
        path.write_text(text)


def _literal(value: Any) -> str:
    return float(value).hex() if isinstance(value, np.floating) else str(int(value))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
