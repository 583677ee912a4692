"""A worker process of the demo: one JSON line on stdout for each line asked on stdin, as the demo's driver talks.

{"progress": "..."}     shown to the user
{"result": {...}}       the answer to the question
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

THREADS = 2  # the same in both workers, so that both compute the same bits


def serve(start: Callable[[Sequence[str], Path], Mapping[str, Callable[[], dict[str, Any]]]]) -> None:
    """Loads by `start(targets, cache)`, then answers the names in what it returned until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True, action="append")
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(THREADS)
    with torch.no_grad():
        answers = start(arguments.target, arguments.cache)
        for line in sys.stdin:
            _send({"result": answers[line.strip()]()})


def progress(text: str) -> None:
    _send({"progress": text})


def _send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
