"""One engine that prefills and one that decodes, behind a router, as on two machines with a store between.

    python examples/vllm/prefill_decode.py [--port 8000] [--model FOLDER] [--ask TEXT]

Each engine talks over shared memory to a sidecar of its own; both sidecars to one node. Runs until Ctrl-C, or, with
`--ask`, until the question is answered. MODEL is by default SmolLM2-135M-Instruct, out of the package that `make
vllm-setup` installs. On a CPU without AVX-512 set DTYPE=float32: bfloat16 is slow there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.demo import model

BIN = Path(sys.executable).parent
START_S_MAX = 600.0
DOCUMENT = "The mill at the mouth of the Arve has two doors, one for the sea and one for the land. " * 40
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def kv_transfer(role: str, address: str) -> str:
    """What `--kv-transfer-config` takes. `lookup_s`: a decode engine waits so long for the next chunk of a prefill."""
    return json.dumps({
        "kv_connector": "KVStoreConnector", "kv_connector_module_path": "kvstore_client.integrations.vllm",
        "kv_role": role, "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address, "lookup_s": 5.0},
    })  # fmt: skip


class Processes:
    """Started one by one; all end with this one."""

    def __init__(self, folder: Path, ending: contextlib.ExitStack) -> None:
        self._folder, self._ending = folder, ending

    def start(self, name: str, *command: str | Path) -> tuple[Path, subprocess.Popen[bytes]]:
        """Where it prints to, and the process."""
        output = self._folder / f"{name}.out"
        with output.open("wb") as out, (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=out, stderr=log, env={**os.environ, **ENVIRONMENT}, start_new_session=True
            )
        self._ending.callback(end, process)
        return output, process

    def store(self, name: str, *flags: str) -> str:
        """A node or a sidecar: its address."""
        output, process = self.start(name, BIN / "kvstore", *flags)
        wait_until(lambda: output.read_text().endswith("\n"), process, self._folder / f"{name}.log")
        return str(json.loads(output.read_text())["addresses"][0])

    def engine(self, name: str, folder: str, port: int, role: str, address: str) -> str:
        self.start(
            name, sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), "--model", folder,
            "--served-model-name", "smollm2", "--dtype", os.environ.get("DTYPE", "auto"), "--max-model-len", "4096",
            "--enforce-eager", "--enable-prompt-tokens-details", "--kv-transfer-config", kv_transfer(role, address),
        )  # fmt: skip
        return f"http://127.0.0.1:{port}"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None, log: Path) -> None:
    until = time.monotonic() + START_S_MAX
    while not condition():
        if time.monotonic() > until or (process is not None and process.poll() is not None):
            raise SystemExit(f"it does not start:\n{log.read_text()[-3000:]}")
        threading.Event().wait(0.1)


def serves(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """With what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def started(processes: Processes, folder: Path, model_folder: str, port: int) -> str:
    """The router's URL, when all serve."""
    node = processes.store("node", "serve", "--listen", "127.0.0.1:0", "--host-capacity", "1GiB")
    engines = []
    for number, (name, role) in enumerate((("prefill", "kv_producer"), ("decode", "kv_consumer")), start=1):
        sidecar = processes.store(
            f"{name}-sidecar", "sidecar", "--upstream", node, "--upstream-timeout-ms", "2000",
            "--listen", f"unix:{folder}/{name}.sock", "--host-capacity", "1GiB",
        )  # fmt: skip
        engines.append(processes.engine(name, model_folder, port + number, role, sidecar))
    for name, engine in zip(("prefill", "decode"), engines, strict=True):
        wait_until(lambda engine=engine: serves(engine), None, folder / f"{name}.log")  # type: ignore[misc]
    router = f"http://127.0.0.1:{port}"
    prefill, decode = engines
    _, process = processes.start(
        "router", sys.executable, Path(__file__).with_name("router.py"), "--port", str(port), "--prefill", prefill,
        "--decode", decode,
    )  # fmt: skip
    wait_until(lambda: serves(router), process, folder / "router.log")
    return router


def ask(router: str, text: str) -> dict[str, Any]:
    asked = {
        "model": "smollm2",
        "prompt": f"{DOCUMENT}\nQuestion: {text}\nAnswer:",
        "max_tokens": 16,
        "temperature": 0.0,
    }
    request = urllib.request.Request(
        f"{router}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_S_MAX) as answer:
        return dict(json.load(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="the router's; the engines have the next two")
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--ask", metavar="TEXT", help="a question about a mill with two doors")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-vllm-")))
        model_folder = given.model or str(model.model_folder(Path(".cache/models")))
        router = started(Processes(folder, ending), folder, model_folder, given.port)
        print(f"ready: {router}/v1/completions, logs in {folder}", flush=True)
        if given.ask is None:
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        else:
            answer = ask(router, given.ask)
            usage = answer["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            print(answer["choices"][0]["text"].strip())
            print(f"{usage['prompt_tokens']} tokens, of which the decode engine was spared {cached}")


if __name__ == "__main__":
    main()
