"""Calls at a hostile server: strict and not, in time, and what is counted and logged of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import kv_objects
import pytest
from hostile_server import Context, Held
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import AsyncClient, AsyncNamespace, KvClientError
from kvstore_client.errors import ERROR_OF_STATUS

LAYOUT = kv_objects.small_layout()
WIDE = kv_objects.small_layout("wide", layers=80, head_dim=256)  # objects over 2 MiB: several messages each
CHUNKS, CHUNK = 4, LAYOUT.chunk_tokens
HELD = Held.of(LAYOUT, CHUNKS, seed=1)
OTHER = Held.of(LAYOUT, CHUNKS, seed=2)
WIDE_HELD = Held.of(WIDE, 8, seed=3)
DEADLINE_S, SLACK_S = 1.0, 0.5
STATUSES = list(ERROR_OF_STATUS)
PAUSE = threading.Event()


@dataclass
class Caller:
    """One client with its own metrics."""

    client: AsyncClient
    registry: CollectorRegistry

    def namespace(self, layout: codec.KVLayout = LAYOUT) -> AsyncNamespace:
        return self.client.namespace(layout)

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"kvstore_client_{name}_total", labels) or 0.0


@asynccontextmanager
async def calling(address: str, *, strict: bool = False, deadline: float = DEADLINE_S) -> Any:
    registry = CollectorRegistry()
    async with AsyncClient(address, strict=strict, deadline=deadline, registry=registry) as client:
        yield Caller(client, registry)


async def timed(call: Awaitable[Any]) -> Any:
    """The call's answer, which must come by the deadline, whatever the server does."""
    began = time.monotonic()
    try:
        return await call
    finally:
        took_s = time.monotonic() - began
        assert took_s < DEADLINE_S + SLACK_S, f"took {took_s:.2f} s"


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The client's log lines; nothing else may have complained, but for gRPC about bytes that are no message, and about
    its own poller, which the loops of one process share: now and then one finds taken what it was woken for."""
    loud = [
        record for record in caplog.records
        if record.levelno >= logging.WARNING and "PollerCompletionQueue" not in record.getMessage()
    ]  # fmt: skip
    strangers = [record for record in loud if record.name not in ("kvstore_client", "grpc._common")]
    assert not strangers, strangers
    return [record.getMessage() for record in loud if record.name == "kvstore_client"]


async def raised(call: Awaitable[Any]) -> KvClientError:
    with pytest.raises(KvClientError) as caught:
        await timed(call)
    return caught.value


def waits(context: Context, seconds: float) -> None:
    end = time.monotonic() + seconds
    while context.is_active() and time.monotonic() < end:
        PAUSE.wait(0.01)
