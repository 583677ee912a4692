"""The disk tier against direct I/O on the same disk, and what a million objects cost to open.

Direct I/O is what `dd oflag=direct conv=fdatasync` and `dd iflag=direct` do: O_DIRECT, blocks as long as an object, one
sync at the end. The tier stores objects with `put`, which syncs each twice (data, index), and with `put_many`, as the
node's write-behind queue does, from the host tier's memory, where the node has them. Contestants take turns on the same
disk; each reads what it wrote, dropped from the page cache before. What comes back is compared with what was put,
outside the timing.

The million are real objects of one block each, stored by `put_many`; a new process opens them. `--node` also starts a
node on them.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

import kvstore_codec as codec
from bench.server_process import server_process
from kvstore.cli import render
from kvstore.cli.bench_tables import three_digits
from kvstore.index.entry import ObjectKey
from kvstore.tiers.disk import DiskTier, NewObject
from kvstore.tiers.disk_writer import BLOCK_BYTES
from kvstore.tiers.host import HostTier

OBJECT_MIB = (1, 4, 16)
ROUND_BYTES = 256 << 20
BATCH_BYTES = 64 << 20
CAPACITY = 1 << 40
SMALL_BATCH = 512
KVSTORE = Path(sys.executable).with_name("kvstore")


@dataclass(frozen=True)
class Speed:
    """Medians over rounds; `ratio` is the median of the rates' ratios to direct I/O within each round."""

    name: str
    object_mib: int
    put_bytes_per_second: float
    put_ratio: float
    read_bytes_per_second: float
    read_ratio: float


@dataclass(frozen=True)
class Opening:
    """Seconds for opening and for the scan; bytes of RAM an object after both. `cold`: index not in the page cache."""

    what: str
    objects: int
    cold: bool
    open_s: float
    scan_s: float
    rss_bytes_per_object: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.disk", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--objects", type=int, default=1_000_000, help="to open; 0: none")
    parser.add_argument("--node", action="store_true", help="also start a node on them")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # the process that is measured
    parsed = parser.parse_args()
    if parsed.open:
        print(json.dumps(_opened(parsed.open)))
        return
    parsed.folder.mkdir(parents=True, exist_ok=True)
    speeds: list[Speed] = []
    openings: list[Opening] = []
    with tempfile.TemporaryDirectory(prefix="disk-", dir=parsed.folder) as folder:
        if parsed.rounds:
            speeds = [row for mib in OBJECT_MIB for row in measure_speed(Path(folder), mib, parsed.rounds)]
            render.print_table(speed_table(speeds, parsed.rounds))
        if parsed.objects:
            openings = measure_opening(Path(folder), parsed.objects, node=parsed.node)
            render.print_table(opening_table(openings))
    if parsed.json:
        figures = {"speeds": [asdict(row) for row in speeds], "openings": [asdict(row) for row in openings]}
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")


# Speed


def objects_of(object_bytes: int, count: int) -> list[NewObject]:
    """Raw objects of nearly, and at most, `object_bytes`, their bytes random."""
    rng = np.random.default_rng(1)
    row_bytes = 2 * 2 * 8 * 128  # K and V of 8 heads in float16, one layer, one token
    layers = max(1, object_bytes // (256 * row_bytes))
    layout = codec.KVLayout.uniform(
        model="bench", revision="bench", num_layers=layers, kv_heads=8, head_dim=128, dtype="float16",
        chunk_tokens=256, rope=codec.RoPE(10000.0),
    )  # fmt: skip
    refs = list(codec.chunk_refs(layout, np.arange(256 * count)))
    made = []
    for ref in refs:
        tokens = (object_bytes - (16 << 10)) // (layers * row_bytes)
        kv = rng.integers(0, 1 << 15, (layers, 2, tokens, 8, 128), np.uint16).view(np.float16)
        blob = codec.encode(kv, layout, quality="raw", first_position=ref.first_token, chunk_hash=ref.hash)
        made.append(NewObject(ObjectKey(layout.namespace_id, ref.hash, 0), ref.parent, blob))
    return made


def in_host(host: HostTier, each: NewObject) -> NewObject:
    host.put(each.key, each.parent, each.data)
    held = host.read(each.key, len(each.data))
    assert held is not None, "it was just put"
    return each._replace(data=held)


def measure_speed(folder: Path, mib: int, rounds: int) -> list[Speed]:
    """Raises SystemExit where what is read is not what was put."""
    host = HostTier(ROUND_BYTES)
    objects = [in_host(host, each) for each in objects_of(mib << 20, ROUND_BYTES // (mib << 20))]
    contestants: dict[str, Callable[[], tuple[float, float]]] = {
        "direct I/O": lambda: _direct_turn(folder / "direct", mib << 20, len(objects)),
        "tier, put": lambda: _tier_turn(folder / "tier", objects, 1),
        f"tier, put_many of {BATCH_BYTES >> 20} MiB": lambda: _tier_turn(
            folder / "tier", objects, max(1, BATCH_BYTES // (mib << 20))
        ),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(-1, rounds):  # the first warms up
        order = list(contestants)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            seconds = contestants[name]()
            size = len(objects) * (mib << 20) if name == "direct I/O" else sum(len(each.data) for each in objects)
            if number >= 0:
                rates[name].append((size / seconds[0], size / seconds[1]))
    direct = rates["direct I/O"]

    def ratio(mine: list[tuple[float, float]], way: int) -> float:
        return statistics.median(ours[way] / theirs[way] for ours, theirs in zip(mine, direct, strict=True))

    return [
        Speed(
            name, mib, statistics.median(put for put, _ in mine), ratio(mine, 0),
            statistics.median(read for _, read in mine), ratio(mine, 1),
        )
        for name, mine in rates.items()
    ]  # fmt: skip


def _direct_turn(path: Path, block_bytes: int, count: int) -> tuple[float, float]:
    buffer = mmap.mmap(-1, block_bytes)  # aligned, as O_DIRECT wants
    buffer[:] = os.urandom(block_bytes)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    try:
        start = time.perf_counter()
        for number in range(count):
            os.pwrite(descriptor, buffer, number * block_bytes)
        os.fdatasync(descriptor)
        put_s = time.perf_counter() - start
        start = time.perf_counter()
        for number in range(count):
            os.preadv(descriptor, [buffer], number * block_bytes)
        return put_s, time.perf_counter() - start
    finally:
        os.close(descriptor)
        path.unlink()


def _tier_turn(root: Path, objects: list[NewObject], batch: int) -> tuple[float, float]:
    tier = DiskTier(root, CAPACITY)
    try:
        start = time.perf_counter()
        for first in range(0, len(objects), batch):
            tier.put_many(objects[first : first + batch])
        put_s = time.perf_counter() - start
        _drop_from_page_cache(root)
        start = time.perf_counter()
        for each in objects:
            tier.read(each.key, len(each.data))
        read_s = time.perf_counter() - start
        if any(tier.read(each.key, len(each.data)) != each.data for each in objects):
            raise SystemExit("bench: what was read is not what was put")
        return put_s, read_s
    finally:
        tier.close()
        shutil.rmtree(root)


def _drop_from_page_cache(root: Path) -> None:
    for path in [root / "index", *(root / "segments").iterdir()]:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# Opening


def small_objects(count: int) -> Iterator[NewObject]:
    """Real objects of less than a block, in chains of 64 chunks."""
    layout = codec.KVLayout.uniform(
        model="bench", revision="bench", num_layers=1, kv_heads=1, head_dim=32, dtype="float16", chunk_tokens=16,
        rope=codec.RoPE(10000.0),
    )  # fmt: skip
    kv = np.random.default_rng(1).standard_normal((1, 2, 16, 1, 32)).astype(np.float16)
    made = 0
    while made < count:
        tokens = np.concatenate([np.full(16, made, np.uint32), np.arange(63 * 16, dtype=np.uint32)])
        for ref in codec.chunk_refs(layout, tokens):
            blob = codec.encode(kv, layout, quality="raw", first_position=ref.first_token, chunk_hash=ref.hash)
            yield NewObject(ObjectKey(layout.namespace_id, ref.hash, 0), ref.parent, blob)
            made += 1
            if made == count:
                return


def measure_opening(folder: Path, count: int, *, node: bool) -> list[Opening]:
    """Raises SystemExit where objects are missing after opening."""
    root = folder / "million"
    tier = DiskTier(root, CAPACITY)
    batch: list[NewObject] = []
    for number, each in enumerate(small_objects(count), 1):
        batch.append(each)
        if len(batch) == SMALL_BATCH or number == count:
            tier.put_many(batch)
            batch.clear()
    tier.close()
    rows = []
    for cold in (False, True):
        if cold:
            os.sync()
            _drop_from_page_cache(root)
        command = [sys.executable, "-m", "bench.disk", "--open", str(root)]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if figures["objects"] != count:
            raise SystemExit(f"bench: {figures['objects']} of {count} objects after opening")
        rows.append(Opening("tier", count, cold, figures["open_s"], figures["scan_s"], figures["rss_bytes"] / count))
    if node:
        rows.append(_node_opening(root, count))
    return rows


def _opened(root: Path) -> dict[str, float]:
    """In a process of its own: what opening costs."""
    DiskTier(root.with_name("empty"), CAPACITY).close()  # what the first use of NumPy takes is not the objects'
    before = _rss_bytes()
    start = time.perf_counter()
    tier = DiskTier(root, CAPACITY)
    open_s = time.perf_counter() - start
    start = time.perf_counter()
    objects = sum(len(piece.tokens) for piece in tier.scan_columns())  # as a node does
    scan_s = time.perf_counter() - start
    figures = {"objects": objects, "open_s": open_s, "scan_s": scan_s, "rss_bytes": _rss_bytes() - before}
    tier.close()
    return figures


def _node_opening(root: Path, count: int) -> Opening:
    """A whole node, from its start to the line that says it is ready, less what one on an empty directory takes."""

    def start(path: Path) -> tuple[float, int]:
        flags: list[str | Path] = ["--listen", "127.0.0.1:0", "--log-level", "warning", "--disk-capacity", "1TiB"]
        flags += ["--disk-path", path]
        began = time.perf_counter()
        with server_process([KVSTORE, "serve", *flags]):
            ready_s = time.perf_counter() - began
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            return ready_s, sum(_rss_bytes(child) for child in children)

    empty_s, empty_bytes = start(root.with_name("empty-node"))
    full_s, full_bytes = start(root)
    return Opening("node", count, False, full_s - empty_s, 0.0, (full_bytes - empty_bytes) / count)


def _rss_bytes(process: str = "self") -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Tables


def speed_table(rows: list[Speed], rounds: int) -> Table:
    title = f"{ROUND_BYTES >> 20} MiB each way a round; medians of {rounds} rounds; page cache dropped before reading"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("object MiB", "put MB/s", "×direct", "read MB/s", "×direct"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = (row.put_bytes_per_second / 1e6, row.put_ratio, row.read_bytes_per_second / 1e6, row.read_ratio)
        table.add_row(row.name, str(row.object_mib), *map(three_digits, figures))
    return table


def opening_table(rows: list[Opening]) -> Table:
    table = Table(title=f"opening {rows[0].objects:,} objects of {BLOCK_BYTES} bytes", title_justify="left")
    for name in ("what", "index", "open s", "scan s", "RAM bytes an object"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = map(three_digits, (row.open_s, row.scan_s, row.rss_bytes_per_object))
        table.add_row(row.what, "on disk" if row.cold else "in page cache", *figures)
    return table


if __name__ == "__main__":
    main()
