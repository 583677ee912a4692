"""Kill -9 of a real node in the middle of puts, over and over on one disk directory.

After each restart: every object that was acknowledged as durable reads back exactly; whatever is visible is whole;
no stage, no file and no byte is left over from what was under way. The instants of the kills and the mix of the
puts follow from SEED; what the operating system makes of them does not.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import kv_objects as kv
import pytest
from node_process import NodeProcess

from kvstore_proto.v1 import store_pb2 as pb

SEED = 20260
KILLS = 25
WRITERS = 4
PROMPTS_A_WRITER = 24
CHUNKS_MAX = 4
KILL_AFTER_S_MAX = 0.35
LAYOUT = kv.small_layout(layers=8, head_dim=64)  # 64 KiB an object


@dataclass
class Ledger:
    """What was sent, and what the node said about it."""

    sent: dict[bytes, kv.StoredChunk] = field(default_factory=dict)
    durable: set[bytes] = field(default_factory=set)
    acknowledged: int = 0
    cut_off: int = 0  # puts that the kill interrupted
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, prompt: list[kv.StoredChunk]) -> None:
        with self.lock:
            self.sent.update((chunk.hash, chunk) for chunk in prompt)

    def answer(self, prompt: list[kv.StoredChunk], results: list[pb.ObjectResult]) -> None:
        with self.lock:
            for chunk, result in zip(prompt, results, strict=True):
                assert result.outcome in (pb.OUTCOME_STORED, pb.OUTCOME_HAVE), result
                self.acknowledged += 1
                if result.durable:
                    self.durable.add(chunk.hash)


def write(node: NodeProcess, prompts: list[tuple[list[kv.StoredChunk], bool]], ledger: Ledger) -> None:
    """Puts `prompts` as fast as the node takes them, until it is gone."""
    stub = node.store
    for prompt, durable in prompts:
        ledger.send(prompt)
        try:
            results = kv.put(stub, LAYOUT, prompt, durable=durable)
        except grpc.RpcError:
            with ledger.lock:
                ledger.cut_off += 1
            return
        if durable:
            assert all(result.durable for result in results), "a durable put is acknowledged as such"
        ledger.answer(prompt, results)


def kill_while_writing(node: NodeProcess, rng: random.Random, ledger: Ledger) -> None:
    work = [
        [
            (kv.chunks(LAYOUT, rng.randint(1, CHUNKS_MAX), seed=rng.getrandbits(48)), rng.random() < 0.5)
            for _ in range(PROMPTS_A_WRITER)
        ]
        for _ in range(WRITERS)
    ]
    kill_after_s = rng.uniform(0.0, KILL_AFTER_S_MAX)
    failures: list[BaseException] = []

    def guarded(prompts: list[tuple[list[kv.StoredChunk], bool]]) -> None:
        try:
            write(node, prompts, ledger)
        except AssertionError as failure:
            failures.append(failure)

    kv.stat(node.store)  # connected: the first put starts at once
    writers = [threading.Thread(target=guarded, args=(prompts,)) for prompts in work]
    for writer in writers:
        writer.start()
    threading.Event().wait(kill_after_s)
    node.process.kill()
    for writer in writers:
        writer.join()
    node.kill()
    assert not failures, failures[0]


def visible(node: NodeProcess) -> Iterator[pb.ObjectEntry]:
    request = pb.ListRequest()
    while True:
        page = node.store.List(request, timeout=kv.DEADLINE_S)
        yield from page.objects
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def check_visible_objects(node: NodeProcess, ledger: Ledger, entries: list[pb.ObjectEntry]) -> None:
    """Everything listed was sent, is whole and is readable."""
    for entry in entries:
        chunk = ledger.sent[entry.chunk_hash]
        assert entry.stored_bytes == len(chunk.blob)
    last = pb.VerifyResponse()
    for last in node.store.Verify(pb.VerifyRequest(), timeout=kv.DEADLINE_S):
        assert not last.damaged_hash, last.problem
    assert last.checked == last.total == len(entries)
    stat = kv.stat(node.store)
    assert (stat.objects, stat.staged_objects, stat.staged_bytes) == (len(entries), 0, 0)


def check_reads_exactly(node: NodeProcess, ledger: Ledger, hashes: list[bytes]) -> None:
    for at in range(0, len(hashes), 64):
        some = hashes[at : at + 64]
        assert len(kv.lookup(node.store, LAYOUT, some)) == len(some), "a durable object is gone"
        assert kv.fetch(node.store, LAYOUT, some) == [ledger.sent[name].blob for name in some]


def check_nothing_left_over(folder: Path, entries: list[pb.ObjectEntry]) -> None:
    """One file for each object that is listed, and no other byte but the lock's and the layout's."""
    names = sorted(path.name for path in folder.glob("objects/*/*"))
    assert names == sorted(f"{entry.chunk_hash.hex()}-{entry.part}-{entry.namespace_id.hex()}.kvc" for entry in entries)
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".kvc"}
    assert others <= {folder / "lock", folder / "namespaces" / f"{LAYOUT.namespace_id.hex()}.json"}
    assert not list((folder / "tmp").iterdir())


@pytest.mark.slow
def test_kill_9_loses_nothing_durable_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    disk = tmp_path / "disk"
    ledger = Ledger()
    flags = ["--host-capacity", "8MiB", "--disk-path", str(disk), "--disk-capacity", "4GiB"]
    seen_durable: set[bytes] = set()
    for kills in range(KILLS + 1):
        node = NodeProcess(tmp_path, *flags)
        try:
            entries = list(visible(node))
            check_nothing_left_over(disk, entries)
            check_visible_objects(node, ledger, entries)
            assert ledger.durable <= {entry.chunk_hash for entry in entries}, "a durable object is not listed"
            fresh = ledger.durable - seen_durable if kills < KILLS else ledger.durable
            check_reads_exactly(node, ledger, sorted(fresh))
            seen_durable |= ledger.durable
            if kills < KILLS:
                kill_while_writing(node, rng, ledger)
        finally:
            node.kill()
    print(f"{len(ledger.sent)} sent, {ledger.acknowledged} acknowledged, {len(ledger.durable)} durable")
    assert len(ledger.durable) > KILLS, "the test wrote too little to mean anything"
    assert ledger.cut_off > KILLS, "the kills came between puts, not inside them"
