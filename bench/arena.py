"""The host tier under a real trace with real sizes: fragmentation, memory exchanged, the time of a put and of a read.

Sizes are those of SmolLM2's KV at every quality, coded by the real codec; each request has one quality, drawn evenly.
Its missing blocks are put, its stored prefix is read; LRU makes room, from the end of a prefix to its start. The
allocator alone replays the whole trace at parts of its unique bytes, which would be hundreds of GiB; the tier itself
replays the first requests in real memory, with views of what it read last held as by slow readers.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

import kvstore_codec as codec
from bench.kv import KV_PATH, REPOSITORY, ROPE_THETA, real_kv
from kvstore.cli import render
from kvstore.cli.bench_codec import load_kv
from kvstore.cli.bench_rivals import Material
from kvstore.cli.bench_rounds import BF16, Bits
from kvstore.cli.bench_tables import three_digits
from kvstore.index.entry import ObjectKey
from kvstore.policies.trace import Trace
from kvstore.policies.trace import load as load_trace
from kvstore.tiers.allocator import aligned
from kvstore.tiers.arena import allocator_for
from kvstore.tiers.host import HostTier

MIB = 1 << 20
TRACE = REPOSITORY.parent / "shared/data/mooncake_conversation_trace.jsonl.zst"
QUALITIES = ("raw", "lossless", "high", "medium", "low")
SHIFTS = 8  # windows of one chunk size: the text cut at so many places
PARTS = (0.01, 0.1, 0.3)
FULL = 0.9  # of the capacity: before, fragmentation says nothing
VIEWS_HELD = 16
READ_ROUNDS = 100
Sizes = dict[str, list[int]]


@dataclass(frozen=True)
class Fragmentation:
    """`refused`: times that room had to be made beyond what bytes alone ask for. `exchanged`: bytes given back and
    taken anew for each byte put. `space`: addresses touched, in capacities."""

    chunk_tokens: int
    page_bytes: int
    part: float
    capacity_bytes: int
    puts: int
    refused: int
    stranded_max: float
    stranded_mean: float
    exchanged: float
    space: float
    us_per_put: float


@dataclass(frozen=True)
class Speed:
    """Medians. `memcpy`: of the same bytes into memory that is there."""

    name: str
    puts: int
    put_us: float
    put_us_per_mib: float
    memcpy_us_per_mib: float


@dataclass(frozen=True)
class Live:
    capacity_bytes: int
    requests: int
    speeds: list[Speed]
    exchanged: float
    stranded_max: float
    waiting_bytes_max: int
    memory_bytes: int
    reads: int
    read_us: float
    read_after_copying_us: float


class Lru:
    """Where each block is, the oldest first; of one prefix the end before the start, so that a leaf goes first."""

    def __init__(self) -> None:
        self._places: OrderedDict[int, tuple[int, int]] = OrderedDict()  # offset, length

    def stored(self, blocks: Sequence[int]) -> Sequence[int]:
        """The longest prefix that is held."""
        return blocks[: next((count for count, block in enumerate(blocks) if block not in self._places), len(blocks))]

    def missing(self, blocks: Sequence[int]) -> list[int]:
        return [block for block in dict.fromkeys(blocks) if block not in self._places]

    def add(self, block: int, offset: int, length: int) -> None:
        self._places[block] = (offset, length)

    def touch(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            if block in self._places:
                self._places.move_to_end(block)

    def length(self, block: int) -> int:
        return self._places[block][1]

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def pop(self) -> tuple[int, int, int]:
        """The victim, its offset and length."""
        block, (offset, length) = self._places.popitem(last=False)
        return block, offset, length


def encoded_sizes(kv: Bits, chunk_tokens: int) -> Sizes:
    """In bytes, of every whole chunk of the text, cut at several places."""
    sizes: Sizes = {quality: [] for quality in QUALITIES}
    for shift in range(0, chunk_tokens, max(1, chunk_tokens // SHIFTS)):
        material = Material.cut(kv[:, :, shift:], chunk_tokens, ROPE_THETA)
        for chunk, start in zip(material.chunks, material.starts, strict=True):
            if chunk.shape[2] == chunk_tokens:
                for quality in QUALITIES:
                    blob = codec.encode(chunk.view(BF16), material.layout, quality=quality, first_position=start)
                    sizes[quality].append(len(blob))
    return sizes


def mean_size(sizes: Sizes) -> float:
    return statistics.fmean(statistics.fmean(sizes[quality]) for quality in QUALITIES)


def replay_allocator(replayed: Trace, sizes: Sizes, part: float, chunk_tokens: int, page: int) -> Fragmentation:
    capacity = int(part * replayed.unique_blocks * mean_size(sizes))
    allocator, lru, rng = allocator_for(capacity, page), Lru(), random.Random(1)
    puts = refused = put_bytes = space = 0
    stranded: list[float] = []
    seconds = 0.0
    for blocks in replayed.requests:
        quality = rng.choice(QUALITIES)
        for block in lru.missing(blocks):
            length = aligned(rng.choice(sizes[quality]))
            started = time.perf_counter()
            while True:
                placement = allocator.place(length) if allocator.used_bytes + length <= capacity else None
                if placement is not None:
                    break
                refused += allocator.used_bytes + length <= capacity
                _, offset, freed = lru.pop()
                allocator.free(offset, freed)
            seconds += time.perf_counter() - started
            lru.add(block, placement.offset, length)
            puts, put_bytes, space = puts + 1, put_bytes + length, max(space, placement.offset + length)
            if allocator.used_bytes > FULL * capacity:
                stranded.append(allocator.stranded_bytes / capacity)
        lru.touch(blocks)
    return Fragmentation(
        chunk_tokens, page, part, capacity, puts, refused, max(stranded), statistics.fmean(stranded),
        allocator.given_up_bytes / put_bytes, space / capacity, 1e6 * seconds / puts,
    )  # fmt: skip


def replay_tier(replayed: Trace, sizes: Sizes, capacity: int, requests: int) -> Live:
    """Every byte that is read is compared with what was put, outside the timing."""
    pool = memoryview(random.Random(2).randbytes(max(map(max, sizes.values())) + (1 << 20)))
    tier, lru, rng = HostTier(capacity), Lru(), random.Random(1)
    copy = bytearray(len(pool))
    held: deque[memoryview] = deque(maxlen=VIEWS_HELD)
    turns: dict[str, list[tuple[int, float, float]]] = {"into free memory": [], "into new memory": []}
    read_s: list[float] = []
    put_bytes = waiting_max = 0
    stranded_max = 0.0
    for blocks in replayed.requests[:requests]:
        for block in lru.stored(blocks):
            started = time.perf_counter()
            view = tier.read(_key(block), lru.length(block))
            read_s.append(time.perf_counter() - started)
            assert view is not None
            assert view == _content(pool, block, len(view)), "what was put"
            held.append(view)
        quality = rng.choice(QUALITIES)
        for block in lru.missing(blocks):
            data = _content(pool, block, rng.choice(sizes[quality]))
            while not tier.room_for(len(data)):
                tier.delete(_key(lru.pop()[0]))
            before = tier.memory_bytes + tier.remapped_bytes
            started = time.perf_counter()
            tier.put(_key(block), bytes(32), data)
            done = time.perf_counter()
            copy[: len(data)] = data
            copied = time.perf_counter()
            new = tier.memory_bytes + tier.remapped_bytes > before
            where = "into new memory" if new else "into free memory"
            turns[where].append((len(data), done - started, copied - done))
            lru.add(block, 0, len(data))
            put_bytes += len(data)
            waiting_max = max(waiting_max, tier.waiting_bytes)
            stranded_max = max(stranded_max, tier.fragmentation_ratio)
        lru.touch(blocks)
    live = Live(
        capacity, min(requests, len(replayed.requests)), [_speed(*turn) for turn in turns.items()],
        tier.remapped_bytes / put_bytes, stranded_max, waiting_max, tier.memory_bytes, len(read_s),
        _read_us(tier, lru), 1e6 * statistics.median(read_s),
    )  # fmt: skip
    tier.close()
    return live


def _read_us(tier: HostTier, lru: Lru) -> float:
    """Of one after the other, of all that is held, several times."""
    keys = [(_key(block), lru.length(block)) for block in lru]
    started = time.perf_counter()
    for _ in range(READ_ROUNDS):
        for key, length in keys:
            tier.read(key, length)
    return 1e6 * (time.perf_counter() - started) / (READ_ROUNDS * len(keys))


def _key(block: int) -> ObjectKey:
    return ObjectKey(bytes(32), block.to_bytes(32, "big"), 0)


def _content(pool: memoryview, block: int, length: int) -> memoryview:
    start = block * 4099 % (1 << 20)
    return pool[start : start + length]


def _speed(name: str, turns: list[tuple[int, float, float]]) -> Speed:
    def per_mib(which: int) -> float:
        return statistics.median(1e6 * turn[which] / (turn[0] / MIB) for turn in turns)

    return Speed(name, len(turns), 1e6 * statistics.median(turn[1] for turn in turns), per_mib(1), per_mib(2))


def sizes_table(sizes: dict[int, Sizes]) -> Table:
    table = Table("tokens", *QUALITIES, title="Encoded KiB of a chunk: smallest, mean, largest")
    for tokens, by_quality in sizes.items():
        table.add_row(
            str(tokens),
            *(
                f"{min(found) / 1024:.1f} {statistics.fmean(found) / 1024:.1f} {max(found) / 1024:.1f}"
                for found in by_quality.values()
            ),
        )
    return table


def fragmentation_table(rows: list[Fragmentation]) -> Table:
    table = Table(
        "tokens", "page", "of all bytes", "capacity GiB", "puts", "stranded max", "mean", "refused", "exchanged/put",
        "addresses", "µs/put", title="The whole trace, offsets only",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.chunk_tokens), f"{row.page_bytes >> 10} KiB", f"{row.part:.0%}",
            three_digits(row.capacity_bytes / (1 << 30)), f"{row.puts:,}", f"{row.stranded_max:.2%}",
            f"{row.stranded_mean:.2%}", str(row.refused), f"{row.exchanged:.2f}", f"{row.space:.2f}x",
            f"{row.us_per_put:.0f}",
        )  # fmt: skip
    return table


def live_table(live: Live) -> Table:
    table = Table(
        "put", "puts", "µs", "µs/MiB", "memcpy µs/MiB",
        title=f"The tier, {live.capacity_bytes >> 20} MiB, {live.requests} requests",
    )  # fmt: skip
    for speed in live.speeds:
        table.add_row(
            speed.name, f"{speed.puts:,}", f"{speed.put_us:.0f}", f"{speed.put_us_per_mib:.0f}",
            f"{speed.memcpy_us_per_mib:.0f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.arena", description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE, help="JSON lines with hash_ids, .zst or plain")
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=(512, 16))
    parser.add_argument("--part", type=float, nargs="+", default=PARTS, help="capacity, of the trace's unique bytes")
    parser.add_argument("--page", type=int, nargs="+", default=(mmap.PAGESIZE, 2 * MIB), help="page size in bytes")
    parser.add_argument("--memory-mib", type=int, default=1024, help="capacity of the tier that is really filled")
    parser.add_argument("--requests", type=int, default=400, help="replayed on it")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    parsed = parser.parse_args()
    kv = load_kv(real_kv(parsed.kv))
    replayed = load_trace(parsed.trace)
    sizes = {tokens: encoded_sizes(kv, tokens) for tokens in parsed.chunk_tokens}
    render.print_table(sizes_table(sizes))
    rows = [
        replay_allocator(replayed, sizes[tokens], part, tokens, page)
        for tokens in parsed.chunk_tokens
        for page in parsed.page
        for part in parsed.part
    ]
    render.print_table(fragmentation_table(rows))
    live = replay_tier(replayed, sizes[parsed.chunk_tokens[0]], parsed.memory_mib * MIB, parsed.requests)
    render.print_table(live_table(live))
    print(
        f"read: {live.read_us:.1f} µs one after the other, median {live.read_after_copying_us:.1f} µs of {live.reads:,}"
        f" between copies of megabytes; exchanged {live.exchanged:.2f} bytes a byte put; "
        f"stranded at most {live.stranded_max:.2%}; waiting for views at most {live.waiting_bytes_max / MIB:.0f} MiB; "
        f"memory {live.memory_bytes / live.capacity_bytes:.1%} of the capacity"
    )
    if parsed.json:
        figures = {"sizes": sizes, "fragmentation": [asdict(row) for row in rows], "live": asdict(live)}
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
