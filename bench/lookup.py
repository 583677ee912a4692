"""Lookups of a 512-chunk prefix: inside the node, and through gRPC, also while another process puts.

The yardsticks through gRPC, in turns with the lookup: calls of a bare server of grpc.aio in a process of its own, one
without content and one of as many bytes as the lookup's; and a call of the node that does nothing (the lookup of one
unknown chunk), above which is the lookup's own. Chunks are small but real objects.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from rich.table import Table

import kvstore_codec as codec
from bench.bare_stream import BareClient
from bench.server_process import channel_to, server_process
from kvstore.cli import render
from kvstore.config import NodeConfig
from kvstore.engine.model import Offer
from kvstore.engine.node import Node
from kvstore_client import Client
from kvstore_client.transports.bulk_path import TRANSPORTS, Transport
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import FramedStoreStub

KVSTORE = Path(sys.executable).with_name("kvstore")
LAYOUT = codec.KVLayout.uniform(
    model="bench-lookup", revision="1", num_layers=1, kv_heads=1, head_dim=16, dtype="float16", chunk_tokens=16
)
PUT_CHUNKS = 8
PUT_LAYOUT = codec.KVLayout.uniform(
    model="bench-put", revision="1", num_layers=16, kv_heads=4, head_dim=64, dtype="float16", chunk_tokens=256
)  # 4 MiB of KV a chunk
CHUNKS = 512


@dataclass(frozen=True)
class Row:
    """Milliseconds."""

    what: str
    p50_ms: float
    p99_ms: float
    calls: int


def prompt(seed: int) -> tuple[list[int], np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50_000, CHUNKS * LAYOUT.chunk_tokens).tolist()
    kv = rng.standard_normal((1, 2, len(tokens), 1, 16)).astype(np.float16)
    return tokens, kv


async def inside(others: int, calls: int) -> Row:
    """`Node.lookup`, lease included, on a node that holds `others` other objects."""
    node = await Node.open(NodeConfig(host_capacity=1 << 30))
    try:
        hashes = await _stored(node, 0)
        for seed in range(1, 1 + others // CHUNKS):
            await _stored(node, seed)
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            found = node.lookup(LAYOUT.namespace_id, hashes, 0, 1000)
            seconds.append(time.perf_counter() - began)
            assert len(found) == CHUNKS
            node.renew(found.lease_id, 0)
        return _row(f"in the node, {others:,} other objects", seconds)
    finally:
        await node.aclose()


async def _stored(node: Node, seed: int) -> list[bytes]:
    tokens, kv = prompt(seed)
    refs = codec.chunk_refs(LAYOUT, tokens)
    blobs = [
        bytes(codec.encode(
            kv[:, :, ref.first_token : ref.first_token + 16], LAYOUT, quality="raw", first_position=ref.first_token,
            chunk_hash=ref.hash,
        ))
        for ref in refs
    ]  # fmt: skip
    offers = [Offer(ref.hash, ref.parent, len(blob), codec.Quality.RAW) for ref, blob in zip(refs, blobs, strict=True)]
    stage = node.offer(LAYOUT.namespace_id, LAYOUT.canonical_bytes, 0, offers)
    for index, blob in enumerate(blobs):
        stage.write(index, 0, blob)
    await node.commit(stage, durable=False)
    return [ref.hash for ref in refs]


def through_grpc(calls: int, putting: Transport | None, pace: float = 0.0) -> list[Row]:
    """`putting`: how the other process' puts travel; None: there is none. `pace`: how many MB a second; 0: no pause."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        command: list[str | Path] = [
            KVSTORE, "serve", "--listen", "127.0.0.1:0", "--host-capacity", "512MiB", "--log-level", "warning",
            "--disk-path", f"{folder}/disk", "--disk-capacity", "2GiB",
        ]  # fmt: skip
        address = stack.enter_context(server_process(command))
        bare_address = stack.enter_context(server_process([sys.executable, "-m", "bench.bare_stream"]))
        tokens, kv = prompt(0)
        client = stack.enter_context(Client(address, deadline=60.0, strict=True))
        cache = client.namespace(LAYOUT)
        cache.put(tokens, kv, quality="raw", retain=(100, 3600))
        stub = FramedStoreStub(stack.enter_context(channel_to(address)))
        bare = BareClient(stack.enter_context(channel_to(bare_address)), timeout_s=10.0)

        def request(hashes: bytes) -> pb.LookupRequest:
            return pb.LookupRequest(namespace_id=LAYOUT.namespace_id, chunk_hashes=hashes, lease_ms=1000)

        whole = request(b"".join(ref.hash for ref in codec.chunk_refs(LAYOUT, tokens)))
        sizes = whole.ByteSize(), stub.Lookup(whole).ByteSize()
        kinds: dict[str, Callable[[], object]] = {
            "bare gRPC, no content": lambda: bare.answer(8, 0),
            "bare gRPC, a lookup's bytes": lambda: bare.answer(*sizes),
            "node, nothing": lambda: stub.Lookup(request(bytes(32)), timeout=10.0),
            "node, lookup": lambda: len(stub.Lookup(whole, timeout=10.0).tokens),
            "SDK, lookup": lambda: len(cache.lookup(tokens, lease_ms=1000).chunks),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        if putting is not None:
            stack.enter_context(_putter(address, putting, pace))
        for _ in range(calls):
            for kind, call in kinds.items():
                began = time.perf_counter()
                found = call()
                seconds[kind].append(time.perf_counter() - began)
                assert not kind.endswith("lookup") or found == CHUNKS
    busy = "idle" if putting is None else f"puts over {putting}" + (f", {pace:.0f} MB/s" if pace else "")
    return [_row(f"{kind}; {busy}", each) for kind, each in seconds.items()]


@contextmanager
def _putter(address: str, transport: Transport, pace: float) -> Iterator[None]:
    """A process that puts, from its first put on until the end."""
    spawn = multiprocessing.get_context("spawn")
    stop, began_putting = spawn.Event(), spawn.Event()
    putter = spawn.Process(target=_put_until, args=(address, transport, pace, began_putting, stop))
    putter.start()
    began_putting.wait()
    try:
        yield
    finally:
        stop.set()
        putter.join()


def _put_until(address: str, transport: Transport, pace: float, began: Event, stop: Event) -> None:
    """Puts prompts of eight chunks of 4 MiB one after the other, or as many as make `pace` MB a second."""
    rng = np.random.default_rng(os.getpid())
    kv = rng.standard_normal((16, 2, PUT_CHUNKS * 256, 4, 64)).astype(np.float16)
    each_s = kv.nbytes / 1e6 / pace if pace else 0.0
    with Client(address, deadline=60.0, transport=transport) as client:
        cache = client.namespace(PUT_LAYOUT)
        next_s = time.monotonic()
        while not stop.wait(max(next_s - time.monotonic(), 0.0)):
            cache.put(rng.integers(0, 50_000, PUT_CHUNKS * 256).tolist(), kv, quality="raw")
            began.set()
            next_s += each_s


def _row(what: str, seconds: list[float]) -> Row:
    cuts = statistics.quantiles(seconds, n=100)
    return Row(what, 1000 * statistics.median(seconds), 1000 * cuts[98], len(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--others", type=int, default=100_000, help="other objects in the node")
    parser.add_argument("--puts", nargs="*", choices=TRANSPORTS, default=["grpc", "auto"], help="how puts travel")
    parser.add_argument(
        "--paces", nargs="+", type=float, default=[200.0, 0.0], help="of the puts, in MB/s; 0: without a pause"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows = [asyncio.run(inside(arguments.others, arguments.calls))]
    rows += through_grpc(arguments.calls, None)
    for putting, pace in itertools.product(arguments.puts, arguments.paces):
        rows += through_grpc(arguments.calls, putting, pace)
    table = Table(title=f"lookup of {CHUNKS} chunks, load average {os.getloadavg()[0]:.1f}")
    for heading in ("what", "p50 ms", "p99 ms", "calls"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.what, f"{row.p50_ms:.3f}", f"{row.p99_ms:.3f}", str(row.calls))
    render.print_table(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
