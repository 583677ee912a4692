"""Kill -9 of a real node, over and over, while processes write to it and read from it.

Two disks take turns: an ample one, from which nothing may be lost, and a tight one, on which everything is evicted all
the time. Now and then the node is killed while it opens. After each kill a new node on the same directory is asked for
all that it holds, and the directory is compared with its answer:

- corrupt: a read, before the kill or after it, that is not byte for byte what was put;
- phantom: an object that nobody put, or that was deleted, or of a length that nobody put;
- lost: an object acknowledged as durable that is not there (on the ample disk, where nothing may be evicted);
- leftover: bytes on disk that belong to no object listed.

`make torture LOOPS=100`. The instants follow from the seed; what the operating system makes of them does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import disk_places
import kv_objects as kv
from node_process import KVSTORE, NodeProcess, clean_environment
from torture_worker import LAYOUT, events, prompt, versions

from kvstore.tiers.disk_index import SLOT_BYTES
from kvstore.tiers.disk_writer import BLOCK_BYTES, blocks_of
from kvstore_proto.v1 import store_pb2 as pb

WRITERS, READERS = 3, 2
RUN_S_MAX = 0.6
OPENING_S_MAX = 1.5
FETCHED_MAX = 200  # chunks compared after a kill, those of the last round first
SUPPORT = Path(disk_places.__file__).parent
FAULTS = ("corrupt", "phantom", "lost", "leftover_bytes")


@dataclass
class Ledger:
    """What the journals of one disk say. `durable[seed]`: the qualities acknowledged as durable."""

    sent: dict[int, set[str]] = field(default_factory=dict)
    durable: dict[int, set[str]] = field(default_factory=dict)
    deleted: set[int] = field(default_factory=set)
    deleting: set[int] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        ledger = cls()
        for what, seed, quality in events(folder):
            if what == "sent":
                ledger.sent.setdefault(seed, set()).add(quality)
            elif what == "durable":
                ledger.durable.setdefault(seed, set()).add(quality)
            else:
                (ledger.deleting if what == "deleting" else ledger.deleted).add(seed)
        return ledger


class Disk:
    """A directory of a node, the flags it is served with, and the journals of what was done to it."""

    def __init__(self, folder: Path, *flags: str, evicts: bool) -> None:
        self.folder, self.root, self.journals = folder, folder / "disk", folder / "journals"
        self.journals.mkdir(parents=True)
        self.flags = [*flags, "--disk-path", str(self.root), "--log-level", "warning"]
        self.evicts = evicts


class Torture:
    def __init__(self, folder: Path, seed: int) -> None:
        self._rng = random.Random(seed)
        self._disks = [
            Disk(folder / "ample", "--host-capacity", "8MiB", "--disk-capacity", "8GiB", evicts=False),
            Disk(folder / "tight", "--host-capacity", "2MiB", "--disk-capacity", "6MiB", evicts=True),
        ]
        self._workers = [_worker("write", seed + number) for number in range(WRITERS)]
        self._workers += [_worker("read", seed + WRITERS + number) for number in range(READERS)]
        self.counts: Counter[str] = Counter()

    def run(self, loops: int) -> None:
        for loop in range(loops + len(self._disks)):
            disk = self._disks[loop % len(self._disks)]
            if loop >= len(self._disks) and self._rng.random() < 0.2:
                self._kill_while_opening(disk)
            node = NodeProcess(disk.folder, *disk.flags)
            try:
                self._check(disk, node)
                if loop < loops:
                    self._kill_while_working(disk, node)
            finally:
                node.kill()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()

    def _kill_while_opening(self, disk: Disk) -> None:
        with subprocess.Popen(
            [KVSTORE, "serve", "--listen", "127.0.0.1:0", *disk.flags],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environment(),
        ) as process:  # fmt: skip
            threading.Event().wait(self._rng.uniform(0, OPENING_S_MAX))
            process.kill()
        self.counts["kills while opening"] += 1

    def _kill_while_working(self, disk: Disk, node: NodeProcess) -> None:
        for number, worker in enumerate(self._workers):
            assert worker.stdin is not None
            worker.stdin.write(f"{node.address} {disk.journals} {number}\n")
            worker.stdin.flush()
        threading.Event().wait(self._rng.uniform(0.05, RUN_S_MAX))
        node.process.kill()
        for worker in self._workers:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise AssertionError("a worker died: see its traceback above")
            self.counts.update(json.loads(line))
        self.counts["kills"] += 1

    def _check(self, disk: Disk, node: NodeProcess) -> None:
        ledger = Ledger.read(disk.journals)
        seeds = {chunk.hash: (seed, number) for seed in ledger.sent for number, chunk in enumerate(prompt(seed, "raw"))}
        listed = list(_listed(node))
        for entry in listed:
            seed, number = seeds.get(entry.chunk_hash, (-1, 0))
            lengths = {len(blob) for blob in versions(seed, number, ledger.sent[seed])} if seed in ledger.sent else ()
            if seed in ledger.deleted or entry.stored_bytes not in lengths:
                self._fault("phantom", f"{entry.chunk_hash.hex()} of seed {seed}, {entry.stored_bytes} bytes")
        last = pb.VerifyResponse()
        for last in node.store.Verify(pb.VerifyRequest(), timeout=kv.DEADLINE_S):
            if last.damaged_hash:
                self._fault("corrupt", last.problem)
        assert last.checked == len(listed)
        self._check_bytes(ledger, node, {entry.chunk_hash for entry in listed}, evicts=disk.evicts)
        self._check_disk(disk, node, listed)

    def _check_bytes(self, ledger: Ledger, node: NodeProcess, visible: set[bytes], *, evicts: bool) -> None:
        left = FETCHED_MAX
        for seed in reversed(ledger.sent):
            chunks = prompt(seed, "raw")
            there = [chunk.hash in visible for chunk in chunks]
            must = ledger.durable.get(seed, set()) if seed not in ledger.deleting and not evicts else set()
            if must and not all(there):
                self._fault("lost", f"seed {seed}, durable as {must}: {there}")
            if left > 0 and any(there):
                fetched = kv.fetch(node.store, LAYOUT, [chunk.hash for chunk in chunks])
                left -= len(fetched)
                self.counts["reads after kills"] += len(fetched)
                for number, blob in enumerate(fetched):
                    if blob not in versions(seed, number, ledger.sent[seed]):
                        self._fault("corrupt", f"seed {seed}, chunk {number}")
                    if "raw" in must and blob != chunks[number].blob:
                        self._fault("lost", f"seed {seed}, chunk {number}: durable as raw, there is less")
        self.counts["durable objects checked"] += sum(len(prompt(seed, "raw")) for seed in ledger.durable)

    def _check_disk(self, disk: Disk, node: NodeProcess, listed: list[pb.ObjectEntry]) -> None:
        """No byte that is not of an object; nothing was written since the node opened."""
        expected = sum(blocks_of(entry.stored_bytes) * BLOCK_BYTES for entry in listed)
        (tier,) = (tier for tier in kv.stat(node.store).tiers if tier.tier == pb.TIER_DISK)
        if tier.objects != len(listed) or tier.used_bytes != expected + len(listed) * SLOT_BYTES:
            self._fault("leftover_bytes", f"the tier counts {tier.objects} objects, {tier.used_bytes} bytes")
        surplus = disk_places.taken_bytes(disk.root) - expected
        index = disk_places.data_bytes(disk.root / "index") - len(listed) * BLOCK_BYTES
        if surplus or index > 2 * BLOCK_BYTES:
            self._fault("leftover_bytes", f"{surplus} bytes in segments")
        strangers = [name for name in disk_places.files(disk.root) if name != "index" and not name.endswith(".seg")]
        if strangers:
            self._fault("leftover_bytes", f"files {strangers}")

    def _fault(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        print(f"{kind}: {what}", file=sys.stderr)


def _worker(role: str, seed: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    return subprocess.Popen(
        [sys.executable, "-m", "torture_worker", role, str(seed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def _listed(node: NodeProcess) -> Iterator[pb.ObjectEntry]:
    request = pb.ListRequest()
    while True:
        page = node.store.List(request, timeout=kv.DEADLINE_S)
        yield from page.objects
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def run(folder: Path, loops: int, seed: int) -> Counter[str]:
    """What was done and what was found; the FAULTS should all be 0."""
    torture = Torture(folder, seed)
    try:
        torture.run(loops)
    finally:
        torture.close()
    return torture.counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--loops", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20260)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvstore-torture-") as folder:
        counts = run(Path(folder), parsed.loops, parsed.seed)
    for name in sorted({*counts, *FAULTS}, key=lambda name: (name in FAULTS, name)):
        print(f"{counts[name]:10,} {name.replace('_', ' ')}")
    sys.exit(any(counts[name] for name in FAULTS))


if __name__ == "__main__":
    main()
