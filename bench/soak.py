"""A node with RAM, disk and Redis under a mixed load for minutes, while it and Redis are killed and paused at random.

Client processes (soak_client.py) hold conversations that grow, at every quality, on capacities so small that objects
are cut, moved and evicted all the time. Every value that they get is compared with what was put, every call is timed.
`kill -9` hits the node (started again on the same disk) and Redis (started again, empty); SIGSTOP hits Redis. In the
last part of the run the node is left alive, so that one incarnation is watched for long.

Exit code 1 if a value was wrong, a call hung, or the node counts damage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kv_objects
import numpy as np
import oracle
import psutil
from node_process import NodeProcess
from redis_process import RedisProcess, free_ports

from bench import soak_plot
from bench.soak_client import SLACK_S

HOST_MIB, DISK_MIB, REDIS_MIB = 12, 24, 64
NODE_ALIVE_PART = 0.4  # of the run, at its end
NODE_LIVES_S = (15.0, 70.0)  # between kills
REDIS_CALM_S = (5.0, 20.0)  # between its faults
REDIS_GONE_S = (0.0, 5.0)
REDIS_PAUSED_S = (0.1, 6.0)
SETTLED_S = 60.0  # of a process' life, before which its memory may grow
SUPPORT = Path(oracle.__file__).parent


@dataclass
class Report:
    """Times are seconds since the start. `faults`: (what, from, to). `memory`: process → [(time, RSS in MiB)];
    `growth_mib_per_minute`: of those watched for long enough, after they settled. `seconds`: what each client did, with
    its number and when it said so. `counters`: of the node's incarnations that could be asked, summed up."""

    minutes: float
    clients: int
    deadline_s: float
    seed: int
    cpu: str
    load_average: float
    faults: list[tuple[str, float, float]] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: list[dict[str, Any]] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    totals: dict[str, Any] = field(default_factory=dict)
    growth_mib_per_minute: dict[str, float] = field(default_factory=dict)


class Soak:
    def __init__(self, folder: Path, report: Report) -> None:
        self._folder, self.report = folder, report
        self._rng = random.Random(report.seed)
        self._began_s = time.monotonic()
        self._end_s = self._began_s + 60 * report.minutes
        self._lock = threading.Lock()  # of the report
        self._stop = threading.Event()
        self._address = f"127.0.0.1:{free_ports(1)[0]}"
        self._redis = RedisProcess(
            folder / "redis", "--maxmemory", f"{REDIS_MIB}mb", "--maxmemory-policy", "allkeys-lru"
        )  # fmt: skip
        self._incarnations = 0
        self._node = self._start_node()
        self._clients = [self._start_client(number) for number in range(report.clients)]

    def run(self) -> None:
        threads = [
            threading.Thread(target=work)
            for work in (self._sample_memory, self._torment_redis, *(self._listener(each) for each in self._clients))
        ]
        for thread in threads:
            thread.start()
        try:
            self._torment_node()
        finally:
            self._stop.set()
            for client in self._clients:
                assert client.stdin is not None
                client.stdin.close()
            for thread in threads:
                thread.join()
        self._ask_counters()
        if any(client.wait() for client in self._clients):
            raise SystemExit("a client process died: see its traceback above")

    def close(self) -> None:
        for client in self._clients:
            client.kill()
        self._node.kill()
        self._redis.stop(signal.SIGKILL)

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _start_node(self) -> NodeProcess:
        self._incarnations += 1
        return NodeProcess(
            self._folder, "--host-capacity", f"{HOST_MIB}MiB", "--disk-path", str(self._folder / "disk"),
            "--disk-capacity", f"{DISK_MIB}MiB", "--redis-url", self._redis.url, "--log-level", "warning",
            listen=self._address,
        )  # fmt: skip

    def _start_client(self, number: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bench.soak_client", self._address, str(self.report.seed + number)]
        return subprocess.Popen(
            [*command, str(self.report.deadline_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{SUPPORT}"},
        )  # fmt: skip

    def _listener(self, client: subprocess.Popen[str]) -> Callable[[], None]:
        def listen() -> None:
            assert client.stdout is not None
            for line in client.stdout:
                second = {"client": self._clients.index(client), "at_s": self._now_s(), **json.loads(line)}
                with self._lock:
                    self.report.seconds.append(second)
            self._stop.set()  # it was told to end, or it died

        return listen

    def _torment_node(self) -> None:
        alive_from_s = self._end_s - NODE_ALIVE_PART * 60 * self.report.minutes
        while not self._stop.wait(min(self._rng.uniform(*NODE_LIVES_S), max(0.0, self._end_s - time.monotonic()))):
            if time.monotonic() >= self._end_s:
                return
            if time.monotonic() < alive_from_s:
                began_s = self._now_s()
                self._ask_counters()
                self._node.kill()
                self._node = self._start_node()
                self._note("node killed", began_s)

    def _torment_redis(self) -> None:
        rng = random.Random(self.report.seed + 1)
        while not self._stop.wait(rng.uniform(*REDIS_CALM_S)):
            began_s = self._now_s()
            if rng.random() < 0.3:
                self._redis.stop(signal.SIGKILL)
                self._stop.wait(rng.uniform(*REDIS_GONE_S))
                self._redis.start()
                self._note("redis killed", began_s)
            else:
                self._redis.pause()
                self._stop.wait(rng.uniform(*REDIS_PAUSED_S))
                self._redis.resume()
                self._note("redis paused", began_s)

    def _note(self, what: str, began_s: float) -> None:
        with self._lock:
            self.report.faults.append((what, began_s, self._now_s()))

    def _ask_counters(self) -> None:
        counted = kv_objects.stat(self._node.store).counters
        with self._lock:
            self.report.counters.update(counted)

    def _sample_memory(self) -> None:
        while not self._stop.wait(1.0):
            watched = {f"node {self._incarnations}": self._node.process.pid}
            watched |= {f"client {number}": client.pid for number, client in enumerate(self._clients)}
            for name, pid in watched.items():
                try:
                    mib = psutil.Process(pid).memory_info().rss / (1 << 20)
                except psutil.NoSuchProcess:
                    continue  # killed a moment ago
                if mib:
                    self.report.memory.setdefault(name, []).append((self._now_s(), mib))


def summed_up(report: Report) -> None:
    """Fills in `totals` and `growth_mib_per_minute`."""
    calls: Counter[str] = Counter()
    tiers: Counter[str] = Counter()
    for second in report.seconds:
        calls.update(second["calls"])
        tiers.update(second["tiers"])
    summed = {name: sum(second[name] for second in report.seconds) for name in ("asked", "hit", "stored", "wrong")}
    hung = [f"at {second['at_s']:.1f} s: {each}" for second in report.seconds for each in second["hung"]]
    report.totals = {
        "calls": dict(calls),
        "calls_per_second": sum(calls.values()) / (60 * report.minutes),
        "hit_rate": summed["hit"] / max(1, summed["asked"]),
        **summed,
        "hung": hung,
        "slowest_s": max(second["slowest_s"] for second in report.seconds),
        "client_held_up_s": max(second["held_up_s"] for second in report.seconds),
        "chunks_found_by_tier": dict(tiers),
        "faults": dict(Counter(what for what, _, _ in report.faults)),
        "damage": {name: count for name, count in report.counters.items() if name.startswith("integrity_failures")},
    }
    for name, samples in report.memory.items():
        settled = np.array([each for each in samples if each[0] - samples[0][0] > SETTLED_S])
        if len(settled) > SETTLED_S:
            slope, _ = np.polyfit(settled[:, 0], settled[:, 1], 1)
            report.growth_mib_per_minute[name] = 60 * float(slope)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=1.0, help="of each call, seconds")
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them there")
    parsed = parser.parse_args()
    report = Report(
        parsed.minutes, parsed.clients, parsed.deadline, parsed.seed, platform.processor() or platform.machine(),
        os.getloadavg()[0],
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="kvstore-soak-") as folder:
        soak = Soak(Path(folder), report)
        try:
            soak.run()
        finally:
            soak.close()
    summed_up(report)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(vars(report)))
    if parsed.plot is not None:
        soak_plot.draw(vars(report), parsed.plot)
    print(json.dumps({**report.totals, "growth_mib_per_minute": report.growth_mib_per_minute}, indent=2))
    print(f"wrong values {report.totals['wrong']}, calls over deadline + {SLACK_S} s {len(report.totals['hung'])}")
    sys.exit(bool(report.totals["wrong"] or report.totals["hung"] or report.totals["damage"]))


if __name__ == "__main__":
    main()
