"""Clients with metrics of their own, prompts, and the bits that a profile must bring back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hostile_server import Answer, Context, results, takes_all, verdicts
from kv_strategies import bits, random_kv
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import Client, KVLayout, Profile
from kvstore_client.profiles import PROFILE_LAYOUT, chunks_of, profile_refs
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed

CHUNK = 16
DEADLINE_S = 20.0  # of calls that are not about time
names = (f"profile-test-{number}" for number in itertools.count())


class Caller:
    """A client with its own metrics, as another process has."""

    def __init__(self, target: Any, *, strict: bool = False, deadline: float = DEADLINE_S) -> None:
        self.registry = CollectorRegistry()
        self.client = Client(target, strict=strict, deadline=deadline, registry=self.registry)

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"kvstore_client_{name}_total", labels) or 0.0

    def events(self, event: str) -> float:
        return self.counted("profiles", event=event)


def prompt(layout: KVLayout, chunks: int, seed: int = 1) -> tuple[list[int], Any]:
    return [seed * 10_000 + position for position in range(chunks * CHUNK)], random_kv(layout, chunks * CHUNK, seed)


def expected(layout: KVLayout, kv: Any, quality: str, profile: Profile | None, read: str | None = None) -> bytes:
    """The bits that `codec.decode` gives for each chunk by itself."""
    out = codec.empty(layout, codec.token_count(kv, layout))
    for first in range(0, codec.token_count(kv, layout), CHUNK):
        some = codec.token_slice(kv, first, first + CHUNK)
        blob = codec.encode(some, layout, quality=quality, first_position=first, profile=profile)
        place = codec.token_slice(out, first, first + CHUNK)
        codec.decode(blob, layout, quality=read, out=place, profile=profile)
    return bits(out)


def refs_of(profile: Profile) -> list[codec.ChunkRef]:
    return profile_refs(profile.profile_id, chunks_of(len(profile.to_bytes())), codec.DEFAULT_TENANT_KEY)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "kvstore_client"]


def refuses_profiles(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
    first = next(requests)
    if first.head.offer.namespace_id != PROFILE_LAYOUT.namespace_id:
        yield from takes_all(itertools.chain([first], requests), context)
        return
    count = len(first.head.offer.objects)
    yield verdicts([pb.VERDICT_REFUSED] * count)
    next(requests)
    yield results([pb.OUTCOME_REJECTED] * count)
