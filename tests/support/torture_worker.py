"""One writer or reader of the torture test: a process that works on a node until the node is gone.

Commanded on stdin, a line a round: `ADDRESS JOURNALS NAME`. Writers note in JOURNALS/NAME what they ask for before they
ask, and what the node answered; readers learn from the journals what there may be and compare every byte they get. A
prompt follows from its seed alone, so a reader needs no more than that. A round ends with a line of JSON on stdout.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import grpc
import kv_objects as kv

import kvstore_codec as codec
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, FramedStoreStub

LAYOUT = kv.small_layout("torture", layers=8, head_dim=64)  # 64 KiB an object, raw
CHUNKS_MAX = 4
QUALITIES = ("low", "raw")  # worse first
SEED_BITS = 48


@lru_cache(1000)
def prompt(seed: int, quality: str) -> list[kv.StoredChunk]:
    return kv.chunks(LAYOUT, 1 + seed % CHUNKS_MAX, seed, quality)


def versions(seed: int, number: int, qualities: set[str]) -> set[bytes]:
    """What a read of a chunk may give: any version that was put, or a coarser reading of it."""
    found = set()
    for quality in qualities:
        blob = prompt(seed, quality)[number].blob
        found |= {blob[:length] for length in codec.parse_header(blob).layer_bytes}
    return found


def events(folder: Path) -> Iterator[tuple[str, int, str]]:
    """(what, seed, quality) from all journals; a line that is being written is left for later."""
    for path in sorted(folder.iterdir()):
        for line in path.read_text().split("\n")[:-1]:
            what, seed, quality = line.split()
            yield what, int(seed), quality


class Writer:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._mine: dict[str, list[tuple[int, str]]] = {}  # by journal: what may be there

    def round(self, store: FramedStoreStub, folder: Path, name: str) -> dict[str, int]:
        """Until the node is gone."""
        counts = {"puts": 0, "durable": 0, "deletes": 0, "cut_off": 0}
        mine = self._mine.setdefault(str(folder), [])
        with (folder / name).open("a", buffering=1) as journal:
            try:
                while True:
                    self._step(store, journal.write, mine, counts)
            except grpc.RpcError:
                counts["cut_off"] += 1
        return counts

    def _step(
        self, store: FramedStoreStub, note: Callable[[str], object], mine: list[tuple[int, str]], counts: dict[str, int]
    ) -> None:
        rng = self._rng
        choice = rng.random()
        if mine and choice < 0.15:
            seed, _ = mine.pop(rng.randrange(len(mine)))
            note(f"deleting {seed} -\n")
            hashes = b"".join(chunk.hash for chunk in prompt(seed, "raw"))
            store.Delete(pb.DeleteRequest(namespace_id=LAYOUT.namespace_id, chunk_hashes=hashes), timeout=kv.DEADLINE_S)
            note(f"deleted {seed} -\n")
            counts["deletes"] += 1
            return
        worse = [number for number, (_, quality) in enumerate(mine) if quality == "low"]
        if worse and choice < 0.35:
            seed, quality = mine.pop(rng.choice(worse))[0], "raw"
        else:
            seed, quality = rng.getrandbits(SEED_BITS), rng.choice(QUALITIES)
        durable = rng.random() < 0.6
        mine.append((seed, quality))
        note(f"sent {seed} {quality}\n")
        results = kv.put(store, LAYOUT, prompt(seed, quality), durable=durable)
        counts["puts"] += 1
        if durable and all(result.durable for result in results):
            note(f"durable {seed} {quality}\n")
            counts["durable"] += 1


class Reader:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def round(self, store: FramedStoreStub, folder: Path, _: str) -> dict[str, int]:
        counts = {"reads": 0, "corrupt": 0}
        try:
            while True:
                sent: dict[int, set[str]] = {}
                for what, seed, quality in events(folder):
                    if what == "sent":
                        sent.setdefault(seed, set()).add(quality)
                recent = list(sent)[-40:]
                for seed in self._rng.sample(recent, min(8, len(recent))):
                    depth = self._rng.choice((codec.Quality.RAW, codec.Quality.LOW))
                    hashes = [chunk.hash for chunk in prompt(seed, "raw")]
                    for number, blob in enumerate(kv.fetch(store, LAYOUT, hashes, quality=depth)):
                        counts["reads"] += 1
                        # What is put right now may be in no journal yet that was read above.
                        counts["corrupt"] += blob not in versions(seed, number, set(QUALITIES))
                if not recent:
                    kv.stat(store)  # nothing yet; and the end is noticed
        except grpc.RpcError:
            return counts


def main(role: str, seed: int) -> None:
    worker = Writer(seed) if role == "write" else Reader(seed)
    for line in sys.stdin:
        address, folder, name = line.split()
        with grpc.insecure_channel(
            address, options=[*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        ) as channel:
            print(json.dumps(worker.round(FramedStoreStub(channel), Path(folder), name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
