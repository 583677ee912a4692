"""Tests with a real vLLM engine: collected only where vLLM is installed, which is `make vllm-test`'s environment."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
