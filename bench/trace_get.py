"""Where the time of one get goes: when each object is asked for, received and decoded, against the slowest stage alone.

    PYTHONPATH=tests/support python -m bench.trace_get [--rounds 15] [--json PATH] [--plot PATH]

The KV is SmolLM2's, 2,000 tokens stored at `high` in chunks of 256, got into memory that is there. A stage alone does
the same work in the same rounds: receiving over the same transport, dropped; decoding, checks included, from memory,
on as many threads. The share is what the slowest of them takes of the get's time: 1 would be a get in which all else
is hidden behind it. Shares are medians of the rounds' own. What is got is compared, every time, outside the timing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from bench.kv import KV_PATH, ROPE_THETA, real_kv
from bench.planner_real import shaped
from bench.server_process import server_process
from kvstore.cli import bench_codec
from kvstore_client import ChunkHit, Client, KVLayout, Namespace, Quality, RoPE
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Connections, Node
from kvstore_client.deadline import Deadline
from kvstore_client.pace import Timing
from kvstore_client.planned import NamespacePlanner
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.bulk_path import Transport
from kvstore_client.transports.transfer import Fetch
from kvstore_client.transports.wanted import Wanted

KVSTORE = Path(sys.executable).with_name("kvstore")
TOKENS = 2000
CHUNK_TOKENS = 256
CALL_S = 120.0


@dataclass(frozen=True)
class Way:
    """How a get goes: `mbit` 0 is loopback as it is; a shaped link carries gRPC only."""

    name: str
    transport: Transport
    threads: int
    mbit: float = 0.0


WAYS = (
    Way("loopback, TCP, 1 thread", "tcp", 1),
    Way("loopback, TCP, 2 threads", "tcp", 2),
    Way("1 Gbit/s, 2 threads", "grpc", 2, 1000),
    Way("200 Mbit/s, 2 threads", "grpc", 2, 200),
)


@dataclass
class Trace:
    """Seconds since the get was called. `found`: it is known what there is, and the first object is on its way. By
    object: (on its way, received), (decoding begun, done)."""

    found: float = 0.0
    receiving: list[tuple[float, float]] = field(default_factory=list)
    decoding: list[tuple[float, float]] = field(default_factory=list)
    took: float = 0.0


@dataclass(frozen=True)
class Result:
    """Medians; `shares`: of each round, the slowest stage alone ÷ the get."""

    way: Way
    get_s: float
    lookup_s: float
    receive_s: float
    decode_s: float
    shares: list[float]
    trace: Trace

    @property
    def slowest(self) -> str:
        return "receive" if self.receive_s > self.decode_s else "decode"


class TracedTiming(Timing):
    """What a get tells the planner, written down."""

    began = 0.0
    trace = Trace()

    async def objects(self, objects: AsyncGenerator[Blob, None]) -> AsyncGenerator[Blob, None]:
        self.trace.found = begun = self.clock() - self.began
        async with aclosing(super().objects(objects)) as timed:
            async for blob in timed:
                received = self.clock() - self.began
                self.trace.receiving.append((begun, received))
                yield blob
                begun = received

    def answered(self, seconds: float) -> None:
        self.trace.found = self.clock() - self.began
        super().answered(seconds)

    def came(self, size_bytes: int, seconds: float, waited_s: float, now: float) -> None:
        self.trace.receiving.append((now - seconds - self.began, now - self.began))
        super().came(size_bytes, seconds, waited_s, now)

    def decoded(self, header: codec.ObjectHeader, size_bytes: int, seconds: float) -> None:
        now = self.clock() - self.began
        self.trace.decoding.append((now - seconds, now))
        super().decoded(header, size_bytes, seconds)


class TracedPlanner(NamespacePlanner):
    """Its fetches are written to `trace`, from `began` on."""

    began = 0.0
    trace = Trace()

    def timing(self, node: Node) -> Timing:
        timing = TracedTiming(
            self._session.peers[node.address], self._decode, self._sizes, self._session.metrics.bytes_received.inc
        )
        timing.began, timing.trace = self.began, self.trace
        return timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loopback", action="store_true", help="leave out the links that are slower")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the median get of each way there")
    options = parser.parse_args()
    kv = bench_codec.load_kv(real_kv(options.kv)).view(ml_dtypes.bfloat16)[:, :, :TOKENS]
    load = os.getloadavg()[0]
    command: list[str | Path] = [
        KVSTORE,
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--log-level",
        "warning",
        "--host-capacity",
        "512MiB",
    ]
    ways = [way for way in WAYS if not (options.loopback and way.mbit)]
    with server_process(command) as address:
        results = [asyncio.run(measure(way, address, np.ascontiguousarray(kv), options.rounds)) for way in ways]
    print(f"{bench_codec.cpu()}, load {load:.1f} before, medians of {options.rounds} rounds")
    print("| | get ms | lookup alone | receive alone | decode alone | one after the other | slowest ÷ get |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        stages = (result.get_s, result.lookup_s, result.receive_s, result.decode_s)
        each = [f"{1e3 * seconds:.1f}" for seconds in (*stages, sum(stages[1:]))]
        share = f"{result.slowest}: {statistics.median(result.shares):.2f}"
        print(f"| {result.way.name} | {' | '.join(each)} | {share} |")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    if options.plot:
        from bench.trace_plot import picture  # here: matplotlib is for the picture alone

        picture(results, options.plot)


async def measure(way: Way, address: str, kv: Any, rounds: int) -> Result:
    """Raises SystemExit where a get does not give back what was put."""
    layers, _, tokens, heads, dim = kv.shape
    layout = KVLayout.uniform(
        model="SmolLM2-135M-Instruct", revision="bench", num_layers=layers, kv_heads=heads, head_dim=dim,
        dtype="bfloat16", chunk_tokens=CHUNK_TOKENS, rope=RoPE(theta=ROPE_THETA),
    )  # fmt: skip
    link = shaped(address.rpartition(":")[2], way.mbit) if way.mbit else nullcontext(address)
    taken: dict[str, list[float]] = {"get": [], "lookup": [], "receive": [], "decode": []}
    traces: list[Trace] = []
    with link as target, ThreadPoolExecutor(way.threads) as threads, Client(
        target, strict=True, deadline=CALL_S, threads=way.threads, transport=way.transport,
        registry=CollectorRegistry(),
    ) as client:  # fmt: skip
        cache = client.namespace(layout, tail=True)
        await asyncio.to_thread(cache.put, range(tokens), kv, quality="high")
        connections = Connections([target], way.transport)
        node = connections.node(target)
        planner = TracedPlanner(cache._async._session, layout)
        cache._async.gets._planner = planner
        out = codec.empty(layout, tokens)
        expected = (await asyncio.to_thread(cache.get, range(tokens))).kv
        for number in range(-1, rounds):  # the first warms up
            took, chunks = await asyncio.to_thread(look_up, cache, tokens)
            received, blobs = await receive(node, layout, chunks)
            decoded = await asyncio.to_thread(decode, layout, chunks, blobs, out, threads)
            out[...] = 0
            trace = await asyncio.to_thread(get, cache, tokens, out, planner)
            if out.tobytes() != expected.tobytes():
                raise SystemExit("bench: what was got is not what was put")
            if number >= 0:
                traces.append(trace)
                for name, seconds in zip(taken, (trace.took, took, received, decoded), strict=True):
                    taken[name].append(seconds)
        await connections.aclose()
    slowest = max(("receive", "decode"), key=lambda name: statistics.median(taken[name]))
    shares = [alone / whole for alone, whole in zip(taken[slowest], taken["get"], strict=True)]
    median = sorted(traces, key=lambda trace: trace.took)[len(traces) // 2]
    get_s, lookup_s, receive_s, decode_s = (statistics.median(seconds) for seconds in taken.values())
    return Result(way, get_s, lookup_s, receive_s, decode_s, shares, median)


def get(cache: Namespace, tokens: int, out: Any, planner: TracedPlanner) -> Trace:
    planner.trace, planner.began = Trace(), time.monotonic()
    cache.get(range(tokens), out=out)
    planner.trace.took = time.monotonic() - planner.began
    return planner.trace


def look_up(cache: Namespace, tokens: int) -> tuple[float, tuple[ChunkHit, ...]]:
    began = time.monotonic()
    hit = cache.lookup(range(tokens))
    return time.monotonic() - began, hit.chunks


async def receive(node: Node, layout: KVLayout, chunks: tuple[ChunkHit, ...]) -> tuple[float, list[bytes]]:
    """(seconds until the last object was here, the objects: copied outside the timing)."""
    wanted, blobs, copying = Wanted(layout, 0, chunks, Quality.RAW, Quality.LOW), [], 0.0
    began = time.monotonic()
    async with aclosing(Fetch(node, wanted, b"", Deadline(CALL_S), lambda _: None)) as asked:
        async with aclosing(asked.objects()) as objects:
            async for blob in objects:
                came = time.monotonic()
                blobs.append(bytes(blob.data))
                blob.done()
                copying += time.monotonic() - came
        await asked.confirm()
    return time.monotonic() - began - copying, blobs


def decode(
    layout: KVLayout, chunks: tuple[ChunkHit, ...], blobs: list[bytes], out: Any, threads: ThreadPoolExecutor
) -> float:  # fmt: skip
    def one(chunk: ChunkHit, blob: bytes) -> None:
        place = codec.token_slice(out, chunk.first_token, chunk.first_token + chunk.tokens)
        codec.decode(blob, layout, out=place, chunk_hash=chunk.hash, part=0, coder=DeadlineCoder(Deadline(CALL_S)))

    began = time.monotonic()
    for done in [threads.submit(one, chunk, blob) for chunk, blob in zip(chunks, blobs, strict=True)]:
        done.result()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
