"""Put and fetch through a real node process, against a bare gRPC stream, a bare socket, memcpy and, where they are
installed, a redis-server and a Mooncake Store with the same bytes; over TLS, where there is openssl to make a
certificate, against a bare TLS socket.

Objects are real KV, stored "raw" so that no coding is in the way; once also at "high", as the rate of the KV that is
restored. Contestants take turns: each round puts and fetches everything once by every route, in rotating order; rates
are medians over rounds, a ratio is the median of the ratios within each round. What is fetched is compared with what
was put, every time, outside the timing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from prometheus_client import CollectorRegistry
from rich.table import Table

import kvstore_codec as codec
from bench import routes
from bench.bare_socket import BareSocket
from bench.certificate import certificate, context
from bench.kv import KV_PATH, ROPE_THETA, real_kv
from bench.mooncake_rival import mooncake_route, mooncake_store
from bench.redis_rival import redis_route, redis_server
from bench.routes import Objects, Route
from bench.server_process import channel_to, server_process
from kvstore.cli import bench_codec, render
from kvstore.cli.bench_rounds import Bits
from kvstore.cli.bench_tables import three_digits
from kvstore_client import TLS, Client
from kvstore_client.transports.bulk_path import Transport

KVSTORE = Path(sys.executable).with_name("kvstore")
OBJECT_MIB = (1, 4, 16)
CAPACITY = "1GiB"
SDK_TLS = "SDK, tcp, TLS"
TRANSPORTS: tuple[Transport, ...] = ("grpc", "tcp", "unix", "shm")


@dataclass(frozen=True)
class Direction:
    """Seconds for all objects, by round; ratios are of rates (0.5: half as fast as the other)."""

    seconds: tuple[float, ...]
    bytes_per_second: float
    to_bare: float
    to_socket: float
    to_memcpy: float
    to_tls: float | None  # None: there is none


@dataclass(frozen=True)
class Result:
    route: str
    put: Direction
    fetch: Direction


@dataclass(frozen=True)
class Report:
    """`object_bytes`: of each object; `total_bytes`: moved each way, each round. `load_average`: before the rounds."""

    objects: int
    object_bytes: int
    total_bytes: int
    rounds: int
    cpu: str
    load_average: float
    results: tuple[Result, ...]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__)
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="2 rounds of two fifths of the KV")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    parsed = parser.parse_args()
    kv = bench_codec.load_kv(real_kv(parsed.kv))
    kv, rounds = (kv[:, :, : kv.shape[2] * 2 // 5], 2) if parsed.quick else (kv, parsed.rounds)
    reports = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-bench-"))
        commands = (
            [sys.executable, "-m", "bench.bare_stream"],
            [sys.executable, "-m", "bench.bare_socket"],
            _serve(),
            _serve("--disk-path", folder, "--disk-capacity", CAPACITY),
        )
        addresses = [stack.enter_context(server_process(command)) for command in commands]
        bare, ram, disk = [stack.enter_context(channel_to(addresses[which])) for which in (0, 2, 3)]
        plain = stack.enter_context(closing(BareSocket(addresses[1])))
        over_tls = stack.enter_context(_tls_rivals())
        clients = [
            stack.enter_context(Client(addresses[2], strict=True, transport=transport, registry=CollectorRegistry()))
            for transport in TRANSPORTS
        ]
        redis = stack.enter_context(redis_server())
        mooncake = stack.enter_context(mooncake_store())
        for mib in OBJECT_MIB:
            objects = raw_objects(kv, mib << 20)
            report = measure(
                [
                    routes.memcpy_route(objects), routes.bare_route(bare, objects), routes.socket_route(plain, objects),
                    routes.node_route(ram, objects), routes.disk_route(disk, objects),
                    *(
                        routes.sdk_route(f"SDK, {transport}", client, objects)
                        for transport, client in zip(TRANSPORTS, clients, strict=True)
                    ),
                    routes.sdk_route("SDK, tcp, high", clients[TRANSPORTS.index("tcp")], objects, "high"),
                    *([] if redis is None else [redis_route(redis, objects)]),
                    *([] if mooncake is None else [mooncake_route(mooncake, objects)]),
                    *([] if over_tls is None else _tls_routes(*over_tls, objects)),
                ],
                objects, rounds,
            )  # fmt: skip
            reports.append(report)
            render.print_table(report_table(report))
            print()
    if parsed.json:
        figures = {"kv": str(parsed.kv), "reports": [asdict(report) for report in reports]}
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")


@contextmanager
def _tls_rivals() -> Iterator[tuple[BareSocket, Client] | None]:
    """A bare TLS socket, and a client over TCP of a node, both with the same certificate; None where there is none."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-bench-tls-"))
        files = certificate(Path(folder))
        if files is None:
            yield None
            return
        cert, key = files
        plain = stack.enter_context(server_process([sys.executable, "-m", "bench.bare_socket", cert, key]))
        node = stack.enter_context(server_process(_serve("--tls-cert", str(cert), "--tls-key", str(key))))
        bare = stack.enter_context(closing(BareSocket(plain, context(cert))))
        client = Client(node, strict=True, transport="tcp", tls=TLS(cert), registry=CollectorRegistry())
        yield bare, stack.enter_context(client)


def _tls_routes(bare: BareSocket, client: Client, objects: Objects) -> list[Route]:
    return [
        routes.socket_route(bare, objects, routes.TLS_SOCKET), routes.sdk_route(SDK_TLS, client, objects)
    ]  # fmt: skip


def raw_objects(kv: Bits, object_bytes_max: int) -> Objects:
    """As many objects of at most `object_bytes_max`, and nearly that, as `kv` gives."""
    layers, _, tokens, kv_heads, head_dim = kv.shape
    values = kv.view(ml_dtypes.bfloat16)

    def layout(chunk_tokens: int) -> codec.KVLayout:
        return codec.KVLayout.uniform(
            model="bench", revision="bench", num_layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16",
            chunk_tokens=chunk_tokens, rope=codec.RoPE(ROPE_THETA),
        )  # fmt: skip

    token_bytes = values[:, :, :1].nbytes
    header_bytes = len(codec.encode(values[:, :, :1], layout(16), quality="raw")) - token_bytes
    chunk_tokens = (object_bytes_max - header_bytes) // token_bytes
    if not 16 <= chunk_tokens <= min(tokens, 2048):
        raise SystemExit(f"bench: {tokens} tokens of {token_bytes} bytes make no object of {object_bytes_max} bytes")
    chosen = layout(chunk_tokens)
    token_ids = np.arange(tokens // chunk_tokens * chunk_tokens)
    refs = codec.chunk_refs(chosen, token_ids)
    blobs = [
        codec.encode(
            codec.token_slice(values, ref.first_token, ref.first_token + ref.tokens), chosen, quality="raw",
            first_position=ref.first_token, chunk_hash=ref.hash,
        )
        for ref in refs
    ]  # fmt: skip
    whole = np.ascontiguousarray(codec.token_slice(values, 0, len(token_ids)))
    return Objects(chosen, token_ids, whole, tuple(refs), tuple(blobs))


def measure(contestants: Sequence[Route], objects: Objects, rounds: int) -> Report:
    """Raises SystemExit where a route does not give back what was put."""
    load_average = os.getloadavg()[0]
    put_s: dict[str, list[float]] = {route.name: [] for route in contestants}
    fetch_s: dict[str, list[float]] = {route.name: [] for route in contestants}
    for number in range(-1, rounds):  # the first warms up
        shift = number % len(contestants)
        for route in [*contestants[shift:], *contestants[:shift]]:
            put, fetch = turn(route)
            if number >= 0:
                put_s[route.name].append(put)
                fetch_s[route.name].append(fetch)
    return Report(
        objects=len(objects.blobs), object_bytes=len(objects.blobs[0]), total_bytes=objects.total_bytes,
        rounds=rounds, cpu=bench_codec.cpu(), load_average=load_average,
        results=tuple(
            Result(route.name, _direction(put_s, route, objects), _direction(fetch_s, route, objects))
            for route in contestants
        ),
    )  # fmt: skip


def turn(route: Route) -> tuple[float, float]:
    """Seconds of the put and of the fetch. Raises SystemExit where they do not agree."""
    start = time.perf_counter()
    route.put()
    put_s = time.perf_counter() - start
    route.settle()
    start = time.perf_counter()
    came = route.fetch()
    fetch_s = time.perf_counter() - start
    if not route.intact(came):
        raise SystemExit(f"bench: {route.name}: what was fetched is not what was put")
    route.clear()
    return put_s, fetch_s


def _direction(seconds: dict[str, list[float]], route: Route, objects: Objects) -> Direction:
    mine = seconds[route.name]

    def to(other: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(seconds[other], mine, strict=True))

    return Direction(
        tuple(mine), objects.total_bytes / statistics.median(mine), to(routes.BARE), to(routes.SOCKET),
        to(routes.MEMCPY), to(routes.TLS_SOCKET) if routes.TLS_SOCKET in seconds else None,
    )  # fmt: skip


def report_table(report: Report) -> Table:
    title = (
        f"objects of {report.object_bytes / 2**20:.2f} MiB, raw, {report.objects} in a call; "
        f"median of {report.rounds} rounds\n{report.cpu}, load {report.load_average:.1f} before"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("put MB/s", "×gRPC", "×socket", "×memcpy", "fetch MB/s", "×gRPC", "×socket", "×memcpy"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.results:
        table.add_row(
            result.route,
            *(
                three_digits(figure)
                for way in (result.put, result.fetch)
                for figure in (way.bytes_per_second / 1e6, way.to_bare, way.to_socket, way.to_memcpy)
            ),
        )
        if result.route == SDK_TLS:
            table.caption = (
                f"{SDK_TLS}, to the bare TLS socket: put {result.put.to_tls:.2f}, fetch {result.fetch.to_tls:.2f}"
            )
    return table


def _serve(*flags: str) -> list[str | Path]:
    return [KVSTORE, "serve", "--listen", "127.0.0.1:0", "--log-level", "warning", "--host-capacity", CAPACITY, *flags]


if __name__ == "__main__":
    main()
