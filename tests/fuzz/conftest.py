"""The fuzzing modules are one package, run by `python -m tests.fuzz.…`; pytest finds it the same way."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
