"""What importing the client costs an engine: nothing of the server's, and no framework."""

from __future__ import annotations

import json
import subprocess
import sys

FORBIDDEN = {
    "kvstore", "pydantic", "typer", "rich", "click", "redis", "torch", "transformers", "gguf", "pytest", "vllm",
}  # fmt: skip


def test_importing_the_client_imports_no_server_and_no_framework() -> None:
    script = "import json, sys, kvstore_client; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    imported = set(json.loads(done.stdout))
    assert {"kvstore_client", "kvstore_codec", "kvstore_cluster", "grpc", "numpy"} <= imported
    assert imported & FORBIDDEN == set()
    assert done.stderr == ""


def test_the_vllm_connector_imports_vllm_when_it_is_asked_for() -> None:
    script = (
        "import sys, kvstore_client.integrations.vllm as package\n"
        "from kvstore_client.integrations.vllm import scheduler, worker\n"
        "print('vllm' in sys.modules, 'torch' in sys.modules)\n"
        "try:\n    package.KVStoreConnector\n"
        "except ModuleNotFoundError as error:\n    print(error.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[:2] == ["False", "False"]
    assert done.stdout.split()[2:] in (["torch"], ["vllm"], [])  # [] where vLLM is installed


def test_importing_the_client_starts_no_thread() -> None:
    """Before it is used: a process may still fork."""
    script = "import threading, kvstore_client; kvstore_client.Client('a:1'); print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1"]
