"""Stores that a vLLM engine can be given: kvstore's node, a sidecar before one, LMCache, Mooncake Store; each a process
or two on this machine. The last two are not among the project's requirements: `make vllm-rivals` brings them, into a
folder of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node_process import NodeProcess
from polling import wait_until
from redis_process import free_ports
from vllm_engine import kv_transfer

RIVALS = Path(__file__).resolve().parents[1] / ".cache" / "rivals"
CAPACITY = "4GiB"
START_S_MAX = 120.0


@dataclass(frozen=True)
class Contestant:
    """What an engine is started with. `transfer`: what `--kv-transfer-config` takes, None for no store."""

    transfer: dict[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.transfer is not None and self.transfer["kv_connector"] == "KVStoreConnector"


@contextmanager
def no_store(folder: Path, quality: str) -> Iterator[Contestant]:
    yield Contestant()


@contextmanager
def node(folder: Path, quality: str) -> Iterator[Contestant]:
    with node_process(folder, "--host-capacity", CAPACITY) as process:
        yield Contestant(kv_transfer(process.address, quality=quality))


@contextmanager
def sidecar(folder: Path, quality: str) -> Iterator[Contestant]:
    """Over a unix socket and shared memory; what is put goes to a node behind it."""
    with (
        node_process(folder, "--host-capacity", CAPACITY) as upstream,
        node_process(
            folder, "--upstream", upstream.address, "--host-capacity", CAPACITY, role="sidecar",
            listen=f"unix:{folder}/sidecar.sock",
        ) as process,
    ):  # fmt: skip
        yield Contestant(kv_transfer(process.address, quality=quality))


@contextmanager
def lmcache(folder: Path, quality: str) -> Iterator[Contestant]:
    port, http_port = free_ports(2)
    # It imports numba, over whose modules vLLM 0.32 stumbles where that comes before it has made its worker: so its
    # engine has a process of its own.
    environment = {
        "PYTHONPATH": str(RIVALS / "lmcache"), "PYTHONHASHSEED": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }  # fmt: skip
    command: list[str | Path] = [
        sys.executable, RIVALS / "lmcache" / "bin" / "lmcache", "server", "--host", "localhost", "--port", str(port),
        "--http-port", str(http_port), "--l1-size-gb", "4", "--l1-init-size-gb", "4", "--eviction-policy", "LRU",
        "--supported-transfer-mode", "auto",
    ]  # fmt: skip
    with process(folder / "lmcache.log", command, environment, http_port):
        yield Contestant(
            {
                "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port},
            },
            environment,
        )  # fmt: skip


@contextmanager
def mooncake(folder: Path, quality: str) -> Iterator[Contestant]:
    """Its pool in a process of its own (`standalone-store`): one inside the engine would die with it."""
    master_port, client_port, metrics_port = free_ports(3)
    libraries = ":".join(str(path) for path in sorted((RIVALS / "libraries").glob("**/x86_64-linux-gnu")))
    config = folder / "mooncake.json"
    environment = {
        "PYTHONPATH": str(RIVALS / "mooncake"), "PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": libraries,
        "MOONCAKE_CONFIG_PATH": str(config),
    }  # fmt: skip
    master = f"127.0.0.1:{master_port}"
    config.write_text(json.dumps({
        "mode": "standalone-store", "metadata_server": "P2PHANDSHAKE", "master_server_address": master,
        "protocol": "tcp", "global_segment_size": 0, "local_buffer_size": 1 << 30,
    }))  # fmt: skip
    binaries = RIVALS / "mooncake" / "mooncake"
    with (
        process(
            folder / "mooncake-master.log",
            [
                binaries / "mooncake_master", f"-rpc_port={master_port}", f"-metrics_port={metrics_port}",
                "-default_kv_lease_ttl=5000",
            ],
            environment, master_port,
        ),
        process(
            folder / "mooncake-client.log",
            [
                binaries / "mooncake_client", "-host=127.0.0.1", f"-port={client_port}", "-protocol=tcp",
                f"-master_server_address={master}", "-metadata_server=P2PHANDSHAKE", "-global_segment_size=4 GB",
            ],
            environment, client_port,
        ),
    ):  # fmt: skip
        yield Contestant({"kv_connector": "MooncakeStoreConnector", "kv_role": "kv_both"}, environment)


CONTESTANTS: dict[str, Callable[[Path, str], AbstractContextManager[Contestant]]] = {
    "node": node, "sidecar": sidecar, "none": no_store, "lmcache": lmcache, "mooncake": mooncake,
}  # fmt: skip


@contextmanager
def node_process(folder: Path, *flags: str, **options: Any) -> Iterator[NodeProcess]:
    started = NodeProcess(folder, *flags, **options)
    try:
        yield started
    finally:
        started.kill()


@contextmanager
def process(log: Path, command: list[str | Path], environment: Mapping[str, str], port: int) -> Iterator[None]:
    """Listens at `port` when this is entered. Raises AssertionError with the end of its log where it does not."""
    with log.open("wb") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})

    def listens() -> bool:
        assert started.poll() is None, f"{command[0]} has ended:\n{log.read_text(errors='replace')[-3000:]}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        wait_until(listens, f"{log.stem} listens; see {log}", deadline_s=START_S_MAX)
        yield
    finally:
        started.kill()
        started.wait()
