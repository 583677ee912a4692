"""What an operator of vLLM's own server sees of kvstore: metrics at its endpoint, KV events, TLS to the node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from node_process import NodeProcess
from polling import wait_until
from redis_process import free_ports
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, kv_transfer
from vllm_server import Server

from kvstore.demo import model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

PROMPT_TOKENS = 700
WHOLE = PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[NodeProcess, dict[str, Any]]]:
    """One that talks TLS alone, to those with a certificate; and the connector's keys for it."""
    authority = Authority(tmp_path / "authority")
    server, engine = authority.certificate("node", "DNS:node"), authority.certificate("engine")
    node = NodeProcess(
        tmp_path, "--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", str(authority.ca)
    )  # fmt: skip
    yield node, {
        "tls_ca": str(authority.ca), "tls_cert": str(engine.cert), "tls_key": str(engine.key),
        "tls_server_name": "node",
    }  # fmt: skip
    node.kill()


class Events:
    """What a router hears of vLLM's publisher."""

    def __init__(self, port: int) -> None:
        import msgspec  # these come with vLLM, which a test had better not import itself: it would be warned of much
        import zmq

        self.port = port
        self.heard: list[dict[str, Any]] = []
        self._context, self._decode = zmq.Context(), msgspec.msgpack.decode
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVTIMEO, 200)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._again, self._ended = zmq.Again, threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def stored(self, medium: str) -> list[dict[str, Any]]:
        return [event for event in self.heard if event["type"] == "BlockStored" and event["medium"] == medium]

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close(0)
        self._context.term()

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                _, _, payload = self._socket.recv_multipart()
            except self._again:
                continue
            _, events, *_ = self._decode(payload)
            self.heard += events


def test_metrics_and_events_of_a_server(tmp_path: Path, node: tuple[NodeProcess, dict[str, Any]]) -> None:
    tokens = AutoTokenizer.from_pretrained(model.model_folder(CACHE))(TEXT * 2).input_ids
    prompt, other = tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS : PROMPT_TOKENS + 20]
    events = Events(free_ports(1)[0])
    publisher = f'{{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:{events.port}"}}'
    # Without the planner: what is counted is to be the same on every machine.
    server = Server(
        tmp_path / "server.log", kv_transfer(node[0].address, planner=False, lookup_s=10.0, **node[1]),
        "--kv-events-config", publisher,
    )  # fmt: skip
    try:
        server.wait_ready()
        first = server.complete(prompt, 8)

        def saved() -> bool:
            server.complete(other, 1)  # what is counted travels with the engine's steps
            return server.metrics().get("vllm:kvstore_tokens_total{save}", 0) >= WHOLE

        wait_until(saved, "it is saved", deadline_s=120)
        server.reset()
        again = server.complete(prompt, 8)
        assert again.tokens == first.tokens
        server.complete(other, 1)
        metrics = server.metrics()
        assert metrics["vllm:kvstore_lookups_total{hit}"] == 1
        assert metrics["vllm:kvstore_lookups_total{miss}"] >= 1
        assert metrics["vllm:kvstore_plans_total{load}"] == 1
        assert metrics["vllm:kvstore_loads_total{whole}"] == 1
        assert metrics["vllm:kvstore_tokens_total{load}"] == WHOLE
        assert metrics["vllm:kvstore_load_seconds_count{}"] == 1
        assert metrics["vllm:kvstore_load_seconds_sum{}"] > 0
        assert metrics["vllm:kvstore_saves_total{stored}"] == metrics["vllm:kvstore_save_seconds_count{}"] >= 1
        assert "vllm:kvstore_lookups_total{failed}" not in metrics

        def logged() -> bool:
            server.complete(other, 1)
            return "kvstore loads whole=1" in server.log()

        wait_until(logged, "vLLM's log has it", deadline_s=60)

        def blocks() -> int:
            return sum(len(event["block_hashes"]) for event in events.stored("STORAGE"))

        wait_until(lambda: blocks() >= WHOLE // BLOCK_TOKENS, "its blocks are told of", deadline_s=30)
        stored = events.stored("STORAGE")
        assert [token for event in stored for token in event["token_ids"]] == prompt[:WHOLE]
        assert {event["ownership"] for event in stored} == {"kvstore"}
        # By the same hashes as vLLM tells of its own memory.
        own = {each for event in events.stored("GPU") for each in event["block_hashes"]}
        assert {each for event in stored for each in event["block_hashes"]} <= own
    finally:
        server.kill()
        events.close()
