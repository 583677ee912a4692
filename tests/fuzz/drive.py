"""One Python target under atheris, with libFuzzer's options: `python -m tests.fuzz.drive TARGET [OPTION]… [FILE]…`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import FunctionType

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]  # not in every environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tests.fuzz.json_mutator import mutated
from tests.fuzz.python_targets import TARGETS  # after the path it needs


def instrument() -> None:
    """Counts coverage in every function of the codec but the reference's: it is no parser of its own, and memory that
    its instrumented code takes is not given back. Atheris's import hook cannot load an editable install's modules, and
    to instrument everything takes half a minute."""
    for function in gc.get_objects():
        if isinstance(function, FunctionType):
            module = f"{function.__module__}."
            if module.startswith("kvstore_codec.") and not module.startswith("kvstore_codec.reference."):
                atheris.instrument_func(function)


def mutate_json(data: bytes, size_max: int, seed: int) -> bytes:
    changed = mutated(data, seed) if seed % 4 else None
    if changed is None or len(changed) > size_max:
        changed = atheris.Mutate(data, size_max)
    return bytes(changed)


def main() -> None:
    name = sys.argv.pop(1)
    target = TARGETS[name]

    def one_input(data: bytes) -> None:
        target(data)

    instrument()
    atheris.Setup(sys.argv, one_input, **({"custom_mutator": mutate_json} if name == "layout" else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
