"""Whether a node that is always full gives anything but what was put: writers, readers, leases, pins and an operator,
in processes of several threads each, on one node with little RAM, little disk and a little Redis.

`PYTHONPATH=tests/support python -m consistency --seconds 600` runs it for longer than the suite does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import consistency_worker
import kv_objects as kv
from consistency_worker import CHUNKS, PINNED
from node_process import NodeProcess
from oracle import LAYOUT
from redis_process import RedisProcess

from kvstore_proto.v1 import admin_pb2

ROLES = ("write", "write", "read", "read", "hold", "operate")
#: What workers call wrong.
FAULTS = (
    "wrong bytes", "wrong values", "too much", "lease lost", "lease broken", "lease worn", "pin broken", "damage",
)  # fmt: skip
LONGER_MAX, ENOUGH = 8, 12
FLAGS = ("--host-capacity", "2MiB", "--disk-capacity", "4MiB", "--log-level", "warning")


def run(folder: Path, seconds: float, seed: int, *flags: str, until: Collection[str] = ()) -> Counter[str]:
    """What was done and what was found (FAULTS), and the node's counters under "node.…". On a machine too busy for the
    counters named in `until` to come to ENOUGH it takes longer, up to LONGER_MAX times. Raises AssertionError where a
    worker died."""
    with contextlib.ExitStack() as running:
        redis = RedisProcess(folder / "redis", "--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru")
        running.callback(redis.stop, signal.SIGKILL)
        node = NodeProcess(folder, *FLAGS, "--disk-path", str(folder / "disk"), "--redis-url", redis.url, *flags)
        running.callback(node.kill)
        kv.put(node.store, LAYOUT, PINNED.objects(CHUNKS, "high"), durable=True)
        pinned = node.admin.Pin(admin_pb2.PinRequest(chunk_hashes=b"".join(PINNED.hashes(CHUNKS))))
        assert pinned.objects == CHUNKS
        workers = [_worker(role, node.address, seed + number) for number, role in enumerate(ROLES)]
        for worker in workers:
            running.callback(worker.kill)
        threading.Event().wait(seconds)
        for _ in range(3 * (LONGER_MAX - 1)):
            if _least(node, until) >= ENOUGH:
                break
            threading.Event().wait(seconds / 3)
        counts: Counter[str] = Counter()
        for role, worker in zip(ROLES, workers, strict=True):
            said, _ = worker.communicate()
            *wrong, summary = said.splitlines() or [""]
            for line in wrong[:20]:
                print(line, file=sys.stderr)
            assert worker.returncode == 0, f"a {role} worker died: see its traceback above"
            counts.update(json.loads(summary))
        counts.update({f"node.{name}": count for name, count in kv.stat(node.store).counters.items()})
        return counts


def _least(node: NodeProcess, counters: Collection[str]) -> float:
    found = kv.stat(node.store).counters
    return min((found[name.removeprefix("node.")] for name in counters), default=math.inf)


def _worker(role: str, address: str, seed: int) -> subprocess.Popen[str]:
    support = Path(consistency_worker.__file__).parent
    return subprocess.Popen(
        [sys.executable, "-m", "consistency_worker", role, address, str(seed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(support)},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m consistency", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=20260)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvstore-consistency-") as folder:
        counts = run(Path(folder), parsed.seconds, parsed.seed)
    for name in sorted({*counts, *FAULTS}, key=lambda name: (name in FAULTS, name)):
        print(f"{counts[name]:12,} {name}")
    sys.exit(any(counts[name] for name in FAULTS))


if __name__ == "__main__":
    main()
