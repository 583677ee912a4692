"""examples/vllm/prefill_decode.py as it stands: two engines, two sidecars, a node and the router, asked over HTTP."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis_process import free_ports
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, START_S_MAX
from vllm_server import complete

from kvstore.demo import model

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "vllm" / "prefill_decode.py"
PROMPT_TOKENS, NEW_TOKENS = 900, 16
STORED = PROMPT_TOKENS // 256 * 256  # in chunks of the connector's own choice


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of the router; prefill and decode have the next two."""
    (port,) = free_ports(1)
    with (tmp_path / "example.log").open("wb") as log:
        example = subprocess.Popen(
            [sys.executable, EXAMPLE, "--port", str(port), "--model", model.model_folder(CACHE)],
            stdout=subprocess.PIPE, stderr=log, env={**os.environ, "DTYPE": "float32", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        assert example.stdout is not None
        readable, _, _ = select.select([example.stdout], [], [], START_S_MAX)
        line = example.stdout.readline() if readable else b""
        assert line.startswith(b"ready: "), (tmp_path / "example.log").read_text()[-4000:]
        yield port
    finally:
        example.send_signal(signal.SIGTERM)
        assert example.wait(120) == 0
        assert example.stdout is not None
        example.stdout.close()


def test_the_decode_engine_goes_on_where_the_prefill_engine_ended(port: int) -> None:
    router, decode = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 2}"
    tokens = AutoTokenizer.from_pretrained(model.model_folder(CACHE))(TEXT * 4).input_ids
    prompts = [tokens[700 * number : 700 * number + PROMPT_TOKENS] for number in range(2)]

    routed = complete(router, prompts[0], NEW_TOKENS)
    assert routed.cached == STORED, "it waited for what the prefill engine was saving"
    assert len(routed.tokens) == NEW_TOKENS
    # Its own prefix cache has the prompt by now.
    native = complete(decode, prompts[0], NEW_TOKENS)
    assert native.cached == (PROMPT_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert routed.tokens == native.tokens

    with urllib.request.urlopen(f"{router}/v1/models") as answer:
        assert b"smollm2" in answer.read()

    # No prefill engine: the decode engine computes.
    kill_server(port + 1)
    alone = complete(router, prompts[1], NEW_TOKENS)
    assert alone.cached == 0
    assert len(alone.tokens) == NEW_TOKENS


def kill_server(port: int) -> None:
    """The process that was told to serve at this port, and its engine's."""
    told = ["vllm.entrypoints.openai.api_server", "--port", str(port)]
    (server,) = (each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[2:5] == told)
    os.killpg(server.pid, signal.SIGKILL)
