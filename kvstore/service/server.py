"""One node as a process: opens it, serves it, and closes it without losing what it acknowledged.

Ready line: once every address accepts calls, `run` hands a `Ready` to its caller, and `kvstore serve` prints it as
one JSON line on stdout (the only thing it prints there; logs go to stderr):

    {"event": "ready", "addresses": ["127.0.0.1:43211"], "metrics": null, "node_id": "a", "pid": 7, "objects": 0}

`addresses` are in the order of `listen`, with the ports really taken.

Shutdown (SIGTERM, SIGINT): health turns NOT_SERVING, no new call is accepted, calls in flight get
`shutdown_grace_s`, then the node writes out what it holds back and closes. A second signal ends the grace at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from kvstore.config import NodeConfig
from kvstore.engine.node import Node
from kvstore.memory import keep_out_of_collections
from kvstore.service.admin import AdminService
from kvstore.service.boundary import Boundary
from kvstore.service.bulk.listener import BulkServer, addresses_beside
from kvstore.service.bulk.service import TransferService
from kvstore.service.bulk.tickets import Tickets
from kvstore.service.listen import EXCLUSIVE_PORT, bind, unlink_sockets
from kvstore.service.live import LiveService
from kvstore.service.metrics_http import metrics_endpoint
from kvstore.service.store import StoreService
from kvstore.service.streams import StreamMetrics
from kvstore.service.tls import ServerTls, open_tls
from kvstore_proto.v1 import admin_pb2, admin_pb2_grpc, live_pb2, store_pb2, transfer_pb2, transfer_pb2_grpc
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, add_framed_store_servicer
from kvstore_proto.v1.live_framing import add_framed_live_servicer

log = logging.getLogger(__name__)

RPCS_MAX = 1024  # served at once; more are answered RESOURCE_EXHAUSTED
LAST_ANSWERS_S = 0.5  # a call is done here a moment before its answer has left
SERVICES = tuple(
    pool.services_by_name[name].full_name
    for pool, name in (
        (store_pb2.DESCRIPTOR, "Store"),
        (live_pb2.DESCRIPTOR, "Live"),
        (transfer_pb2.DESCRIPTOR, "Transfer"),
        (admin_pb2.DESCRIPTOR, "Admin"),
    )
)
SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    EXCLUSIVE_PORT,
    ("grpc.keepalive_time_ms", 30_000),  # a client whose machine vanished is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


@dataclasses.dataclass(frozen=True)
class Ready:
    """Where a node that accepts calls can be reached."""

    addresses: tuple[str, ...]
    metrics: str | None  # URL
    node_id: str
    pid: int
    objects: int  # found on disk at start


async def run(config: NodeConfig, on_ready: Callable[[Ready], None]) -> None:
    """Serves until SIGTERM or SIGINT. Raises ListenError, ConfigError and what `Node.open` raises."""
    registry = CollectorRegistry()
    tls = open_tls(config, registry)
    with _signals() as signals, metrics_endpoint(config.metrics_listen, registry) as metrics_url:
        node = await Node.open(config, registry=registry)
        try:
            await _serve(config, node, registry, tls, metrics_url, signals, on_ready)
        finally:
            log.info("flushing")
            await node.aclose()
    log.info("stopped")


async def _serve(
    config: NodeConfig, node: Node, registry: CollectorRegistry, tls: ServerTls | None, metrics_url: str | None,
    signals: asyncio.Queue[signal.Signals], on_ready: Callable[[Ready], None],
) -> None:  # fmt: skip
    boundary = Boundary(registry)
    server = grpc.aio.server(interceptors=[boundary], options=SERVER_OPTIONS, maximum_concurrent_rpcs=RPCS_MAX)
    streams = StreamMetrics(registry)
    add_framed_store_servicer(StoreService(node, stream_idle_s=config.stream_idle_s, metrics=streams), server)
    add_framed_live_servicer(LiveService(node, stream_idle_s=config.stream_idle_s, metrics=streams), server)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(node), server)  # type: ignore[no-untyped-call]
    health_service = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    addresses = bind(server, config.listen_addresses, tls)
    tickets = Tickets(time.monotonic)
    try:
        bulk = BulkServer(
            node, _bulk_addresses(config, addresses), tickets, boundary, streams, registry,
            stream_idle_s=config.stream_idle_s, hold_ms_max=config.lease_ms_max, tls=tls,
        )  # fmt: skip
        if tls is not None and all(each.startswith("unix") for each in (*addresses, *bulk.addresses)):
            log.warning("tls_cert is set, but only unix sockets are listened on, which stay plain: add a TCP --listen")
        with closing(bulk):
            transfer_pb2_grpc.add_TransferServicer_to_server(  # type: ignore[no-untyped-call]
                TransferService(tickets, bulk.addresses), server
            )
            await server.start()
            for service in ("", *SERVICES):
                await health_service.set(service, health_pb2.HealthCheckResponse.SERVING)
            ready = Ready(addresses, metrics_url, config.node_name, os.getpid(), node.stat().objects)
            keep_out_of_collections()
            log.info("ready on %s, %d objects", ", ".join(addresses), ready.objects)
            on_ready(ready)
            received = await signals.get()
            log.info("%s: finishing calls in flight, at most %g s", received.name, config.shutdown_grace_s)
            await health_service.enter_graceful_shutdown()
            node.live.stop_waiting()
            await _drain(server, boundary, signals, config.shutdown_grace_s)
    finally:
        await server.stop(None)
        unlink_sockets(addresses)


def _bulk_addresses(config: NodeConfig, listen: Sequence[str]) -> Sequence[str]:
    if config.bulk_listen == "none":
        return ()
    return addresses_beside(listen) if config.bulk_listen == "auto" else config.bulk_listen.split(",")


async def _drain(
    server: grpc.aio.Server, boundary: Boundary, signals: asyncio.Queue[signal.Signals], grace_s: float
) -> None:
    """Returns when our calls are done, the grace is over or another signal came.

    Health watchers never end by themselves: they count neither here nor in the grace.
    """
    stopping = asyncio.create_task(server.stop(grace_s))
    waits = [asyncio.create_task(boundary.wait_idle()), asyncio.create_task(signals.get())]
    await asyncio.wait([stopping, *waits], return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await server.stop(min(grace_s, LAST_ANSWERS_S))
    await stopping


@contextmanager
def _signals() -> Iterator[asyncio.Queue[signal.Signals]]:
    """The SIGTERMs and SIGINTs that arrive while inside."""
    arrived: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    watched = (signal.SIGTERM, signal.SIGINT)
    for number in watched:
        loop.add_signal_handler(number, arrived.put_nowait, number)
    try:
        yield arrived
    finally:
        for number in watched:
            loop.remove_signal_handler(number)
