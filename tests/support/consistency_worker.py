"""One process of the consistency test: `python -m consistency_worker ROLE ADDRESS SEED` until stdin ends.

It prints what it found wrong, a line each, and at the end a line of JSON with what it did.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import grpc
import kv_objects as kv
from oracle import CHUNK_TOKENS, LAYOUT, QUALITIES, Conversation
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import Client
from kvstore_codec import Quality
from kvstore_proto.v1 import admin_pb2
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.admin_pb2_grpc import AdminStub
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, FramedStoreStub

#: Even conversations are never deleted, and share no chunk with the odd ones.
TALKS, SYSTEMS, CHUNKS = 60, 6, 8
PINNED = Conversation(1000)
LEASE_MS = 600
PUT_WEIGHTS = (3, 3, 3, 1)  # raw objects do not shrink
THREADS = 2


class Worker:
    def __init__(self, channel: grpc.Channel, address: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.store, self.admin = FramedStoreStub(channel), AdminStub(channel)  # type: ignore[no-untyped-call]
        self.client = Client(address, deadline=kv.DEADLINE_S, registry=CollectorRegistry())
        self.counts: Counter[str] = Counter()

    def talk(self, *, even: bool = False) -> Conversation:
        popular = min(int(self.rng.paretovariate(0.5)) - 1, TALKS - 1)
        number = popular if self.rng.random() < 0.5 else self.rng.randrange(TALKS)
        return Conversation(number - number % 2 if even else number, systems=SYSTEMS)

    def wrong(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        print(f"{kind}: {what}", flush=True)


def write(worker: Worker) -> None:
    talk, (quality,) = worker.talk(), worker.rng.choices(QUALITIES, PUT_WEIGHTS)
    objects = talk.objects(worker.rng.randint(1, CHUNKS), quality)
    for result in kv.put(worker.store, LAYOUT, objects, durable=worker.rng.random() < 0.3):
        worker.counts[f"put {pb.Outcome.Name(result.outcome).removeprefix('OUTCOME_').lower()}"] += 1
        if result.outcome == pb.OUTCOME_REJECTED and "put it again" not in result.reason:
            worker.counts[result.reason] += 1


def read(worker: Worker) -> None:
    talk, quality = worker.talk(), Quality.parse(worker.rng.choice(QUALITIES))
    if worker.rng.random() < 0.3:
        cache = worker.client.namespace(LAYOUT)
        values, tokens = cache.get(talk.tokens(CHUNKS), quality=quality)
        worker.counts["decoded"] += tokens // CHUNK_TOKENS
        for position in talk.wrong_chunks(values, tokens, quality):
            worker.wrong("wrong values", f"conversation {talk.number}, chunk {position} at {quality.label}")
        return
    for position, data in enumerate(kv.fetch(worker.store, LAYOUT, talk.hashes(CHUNKS), quality=quality)):
        worker.counts["fetched"] += 1
        if not talk.is_legal_object(position, data):
            worker.wrong("wrong bytes", f"conversation {talk.number}, chunk {position}: {len(data)} bytes")
        header = codec.parse_header(data)
        if header.quality_at(len(data)) < quality and len(header.layer_bytes) > 1:
            worker.wrong("too much", f"conversation {talk.number}, chunk {position} for {quality.label}")


def hold(worker: Worker) -> None:
    """A lease: until its end, all that was found is there, no worse than it was."""
    talk = worker.talk(even=True)
    hashes = talk.hashes(CHUNKS)
    asked_s = time.monotonic()
    request = pb.LookupRequest(
        namespace_id=LAYOUT.namespace_id, chunk_hashes=b"".join(hashes), lease_ms=LEASE_MS
    )  # fmt: skip
    found = worker.store.Lookup(request, timeout=kv.DEADLINE_S)
    until_s = asked_s + found.lease_ms / 1000
    told = [
        quality for quality, tier in zip(found.quality, found.tier, strict=True) if tier != pb.TIER_REDIS
    ]  # fmt: skip
    worker.counts["leases"] += bool(told)
    renewals = worker.rng.choice((0, 0, 1, 2))
    while told:
        if renewals and worker.rng.random() < 0.2:
            renewals -= 1
            asked_s = time.monotonic()
            renewed = worker.store.Renew(
                pb.RenewRequest(lease_id=found.lease_id, lease_ms=LEASE_MS), timeout=kv.DEADLINE_S
            )  # fmt: skip
            if time.monotonic() < until_s and not renewed.lease_ms:
                worker.wrong("lease lost", "renewed in time, and refused")
            until_s = max(until_s, asked_s + renewed.lease_ms / 1000)
        fetched = kv.fetch(worker.store, LAYOUT, hashes[: len(told)])
        if time.monotonic() >= until_s:
            break
        worker.counts["leased reads"] += len(fetched)
        held = [codec.parse_header(data).quality_at(len(data)) for data in fetched]
        if len(held) < len(told):
            worker.wrong("lease broken", f"conversation {talk.number}: {len(held)} of {len(told)} chunks")
        for position, (quality, least) in enumerate(zip(held, told, strict=False)):
            if quality > least:
                worker.wrong("lease worn", f"conversation {talk.number}, chunk {position}: {quality}, not {least}")
    if worker.rng.random() < 0.5:
        worker.store.Renew(pb.RenewRequest(lease_id=found.lease_id), timeout=kv.DEADLINE_S)


def operate(worker: Worker) -> None:
    rng, choice = worker.rng, worker.rng.random()
    hashes = b"".join(worker.talk().hashes(CHUNKS))
    if choice < 0.3:
        evicted = worker.admin.Evict(
            admin_pb2.EvictRequest(tier=rng.choice(("host", "disk", "")), bytes=rng.randint(1, 400_000))
        )  # fmt: skip
        worker.counts["evicted"] += evicted.objects
    elif choice < 0.4:
        worker.counts["evicted"] += worker.admin.Evict(admin_pb2.EvictRequest(chunk_hashes=hashes)).objects
    elif choice < 0.6:
        worker.counts["pinned"] += worker.admin.Pin(admin_pb2.PinRequest(chunk_hashes=hashes, seconds=1)).objects
    elif choice < 0.8:
        odd = Conversation(2 * rng.randrange(TALKS // 2) + 1, systems=SYSTEMS)
        deleted = worker.store.Delete(
            pb.DeleteRequest(
                namespace_id=LAYOUT.namespace_id, chunk_hashes=b"".join(odd.hashes(CHUNKS)[rng.randrange(CHUNKS) :])
            )
        )  # fmt: skip
        worker.counts["deleted"] += deleted.objects
    elif choice < 0.85:
        for progress in worker.store.Verify(pb.VerifyRequest()):
            worker.counts["verified"] += 1
            if progress.damaged_hash:
                worker.wrong("damage", progress.problem)
    fetched = kv.fetch(worker.store, LAYOUT, PINNED.hashes(CHUNKS))
    if fetched != [chunk.blob for chunk in PINNED.objects(CHUNKS, "high")]:
        worker.wrong("pin broken", f"{len(fetched)} chunks of {sum(map(len, fetched))} bytes")
    worker.counts["pinned reads"] += len(fetched)


ROLES: dict[str, tuple[Callable[[Worker], None], float]] = {
    "write": (write, 0.0), "read": (read, 0.0), "hold": (hold, 0.0), "operate": (operate, 0.02),
}  # fmt: skip


def main(role: str, address: str, seed: int) -> None:
    stop = threading.Event()
    act, pause_s = ROLES[role]
    problems: list[BaseException] = []
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        workers = [Worker(channel, address, seed + 100 * number) for number in range(THREADS)]

        def run(worker: Worker) -> None:
            try:
                while not stop.is_set():
                    act(worker)
                    stop.wait(pause_s)
            except BaseException as problem:
                problems.append(problem)
                raise

        threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()
    print(json.dumps(sum((worker.counts for worker in workers), Counter())), flush=True)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
