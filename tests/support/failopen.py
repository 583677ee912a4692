"""It fails open: every public call of a client while its node is gone, stopped or worse, over and over.

Real processes: a node, a client (failopen_client.py), and between them a relay on every address of the node
(fault_relay.py). In each cycle a fault comes while all public calls of a synchronous and an asynchronous client are
under way, and all of them are made again before it is over; faults and transports take turns. What must not be:

- wrong: a value that nobody put, or an array written to after its call had returned;
- untyped: an exception that is no KvClientError, or any where the client is not strict (but for `stat`);
- late: a call that ends more than 50 ms after its deadline, not counting what the machine kept it waiting meanwhile:
  what a bare sleep of the same process was late, or its event loops waited for a core;
- slow to recover: no hit within 2 s of the peer's return;
- leaks: threads, pools of them, descriptors, tasks, mappings or memory that grow from the cycles after the first ones
  to the last.

`make failopen CYCLES=1000`. The instants follow from the seed; what the operating system makes of them does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import relayed_node
from failopen_calls import HELD, HELD_CHUNKS, LAYOUT, kv_of, tokens_of
from failopen_client import TRANSPORTS
from fault_relay import FaultRelay
from node_process import NodeProcess
from prometheus_client import CollectorRegistry

from kvstore_client import Client

FAULTS = ("kill -9", "stop", "blackhole", "reset", "garbage", "dribble")
PROBLEMS = ("wrong", "untyped", "late", "slow to recover", "leaks")
DEADLINES_S = (0.05, 0.1, 0.15)
LATE_MS_MAX = 50.0
RECOVERY_S_MAX = 2.0
#: What may be added from the cycles after the first ones to the last: connections kept open come and go.
GROWTH_MAX = {"pools": 4, "threads": 8, "descriptors": 24, "tasks": 8, "mappings": 8, "rss_bytes": 48 << 20}
WARM_SHARE, WINDOW_SHARE = 0.4, 0.2  # of the cycles: before resources are looked at, and for how long
WARM_CYCLES_MAX, WINDOW_CYCLES_MAX = 400, 60  # by then clients have filled what they keep for puts and gets
ANSWER_S_MAX = 120.0
SUPPORT = Path(relayed_node.__file__).parent


@dataclass(frozen=True)
class Done:
    """One cycle, and what its client found (failopen_client.Cycle)."""

    fault: str
    transport: str
    strict: bool
    found: dict[str, Any]


class Nodes:
    """A node that serves, and one that waits to take its place; each holds the prompt that is read."""

    def __init__(self, folder: Path, relay: FaultRelay) -> None:
        self._folder, self._relay, self._started = folder, relay, 0
        self._starting = ThreadPoolExecutor(1)
        self._next: Future[tuple[NodeProcess, list[str]]] = self._starting.submit(self._start)
        self.now = self._take()

    def replace(self) -> None:
        """The next one is served by the relay from now on."""
        self.now = self._take()

    def close(self) -> None:
        self.now.kill()
        self._next.result()[0].kill()
        self._starting.shutdown()

    def _take(self) -> NodeProcess:
        node, addresses = self._next.result()
        self._next = self._starting.submit(self._start)
        self._relay.point(addresses)
        return node

    def _start(self) -> tuple[NodeProcess, list[str]]:
        self._started += 1
        own = self._folder / f"node-{self._started}.sock"
        into = self._folder / f"node-{self._started}.addresses"
        environment = (f"RELAYED_AT={','.join(self._relay.addresses[1:])}", f"RELAYED_INTO={into}")
        node = NodeProcess(
            self._folder, "--bulk-listen", f"127.0.0.1:0,unix:{own}", "--host-capacity", "128MiB", "--log-level",
            "warning", command=("env", *environment, sys.executable, relayed_node.__file__),
        )  # fmt: skip
        with Client(
            node.address, deadline=30.0, strict=True, transport="grpc", registry=CollectorRegistry()
        ) as client:  # fmt: skip
            cache, kv = client.namespace(LAYOUT), kv_of(HELD, HELD_CHUNKS)
            cache.put(tokens_of(HELD, HELD_CHUNKS), kv, quality="raw", retain=(100, 86_400))
        return node, [node.address, *into.read_text().split("\n")]


class FailOpen:
    def __init__(self, folder: Path, seed: int) -> None:
        self._rng = random.Random(seed)
        self._relay = FaultRelay(folder)
        self._nodes = Nodes(folder, self._relay)
        self._client = subprocess.Popen(
            [sys.executable, "-m", "failopen_client", self._relay.addresses[0]], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        )  # fmt: skip

    def cycle(self, number: int) -> Done:
        fault, transport = FAULTS[number % len(FAULTS)], TRANSPORTS[number % len(TRANSPORTS)]
        strict = bool((number // 5 + number // 30) % 2)  # so that all meet in 60 cycles
        deadline_s = self._rng.choice(DEADLINES_S)
        self._ask(transport=transport, strict=strict, deadline_s=deadline_s, number=8 * (number + 1))
        self._answer()
        threading.Event().wait(self._rng.uniform(0, deadline_s))
        self._inject(fault)
        self._ask(injected=True)
        self._answer()
        self._heal(fault)
        self._ask(healed_s=time.monotonic())
        return Done(fault, transport, strict, self._answer())

    def close(self) -> None:
        self._client.kill()
        self._client.communicate()
        self._relay.close()
        self._nodes.close()

    def _inject(self, fault: str) -> None:
        if fault == "kill -9":
            self._nodes.now.kill()
            self._relay.inject("refuse")
        elif fault == "stop":
            self._nodes.now.process.send_signal(signal.SIGSTOP)
        else:
            self._relay.inject(fault)

    def _heal(self, fault: str) -> None:
        if fault == "stop":
            self._nodes.now.process.send_signal(signal.SIGCONT)
            return
        if fault == "kill -9":
            self._nodes.replace()
        self._relay.heal()

    def _ask(self, **what: object) -> None:
        assert self._client.stdin is not None
        self._client.stdin.write(json.dumps(what) + "\n")
        self._client.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._client.stdout is not None
        hangs = threading.Timer(ANSWER_S_MAX, self._client.kill)
        hangs.start()
        line = self._client.stdout.readline()
        hangs.cancel()
        if not line:
            raise AssertionError(f"the client process died, or hung for {ANSWER_S_MAX:g} s: see above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def growth(cycles: Sequence[Done]) -> dict[str, int]:
    """Of each resource: its most in the last cycles less its most in those after the first ones."""
    first = min(int(len(cycles) * WARM_SHARE), WARM_CYCLES_MAX)
    window = max(1, min(int(len(cycles) * WINDOW_SHARE), WINDOW_CYCLES_MAX))
    used = [done.found["resources"] for done in cycles]
    return {
        name: max(each[name] for each in used[-window:]) - max(each[name] for each in used[first : first + window])
        for name in GROWTH_MAX
    }


def problems(cycles: Sequence[Done], late_ms_max: float, recovery_s_max: float) -> Counter[str]:
    """How often each of PROBLEMS was, none of which should be."""
    counts: Counter[str] = Counter(dict.fromkeys(PROBLEMS, 0))
    for done in cycles:
        found = done.found
        raised = sum(found["errors"].values()) if not done.strict else 0
        counts["wrong"] += found["counts"].get("wrong", 0) + found["counts"].get("touched", 0)
        counts["untyped"] += len(found["untyped"]) + max(0, raised - found["stat_errors"])
        counts["late"] += sum(beyond_ms > late_ms_max for _, beyond_ms in found["late_ms"].values())
        counts["slow to recover"] += sum(seconds > recovery_s_max for seconds in found["recovery_s"])
    counts["leaks"] = sum(more > GROWTH_MAX[name] for name, more in growth(cycles).items())
    return counts


def run(folder: Path, cycles: int, seed: int) -> list[Done]:
    failopen = FailOpen(folder, seed)
    try:
        return [failopen.cycle(number) for number in range(cycles)]
    finally:
        failopen.close()


def table(cycles: Sequence[Done]) -> str:
    """By fault and transport: the latest call, as it was and without what the machine kept it waiting; the recovery."""
    lines = [f"{'':10} {'':5} {'calls':>7} {'late ms':>8} {'beyond ms':>10} {'recovery s':>10} {'most':>6} {'bulk':>5}"]
    for fault in FAULTS:
        for transport in TRANSPORTS:
            found = [done.found for done in cycles if (done.fault, done.transport) == (fault, transport)]
            if not found:
                continue
            late = [pair for each in found for pair in each["late_ms"].values()]
            recovery = [seconds for each in found for seconds in each["recovery_s"]]
            lines.append(
                f"{fault:10} {transport:5} {sum(each['calls'] for each in found):7,} {max(ms for ms, _ in late):8.1f} "
                f"{max(ms for _, ms in late):10.1f} {statistics.median(recovery):10.3f} {max(recovery):6.2f} "
                f"{sum(each['ways'] for each in found) / len(found) / 2:5.0%}"
            )
    return "\n".join(lines)


def calls_table(cycles: Sequence[Done]) -> str:
    """By call: the latest."""
    lines = [f"{'':10} {'late ms':>8} {'beyond ms':>10}"]
    for name in cycles[0].found["late_ms"]:
        late = [done.found["late_ms"][name] for done in cycles if name in done.found["late_ms"]]
        lines.append(f"{name:10} {max(ms for ms, _ in late):8.1f} {max(ms for _, ms in late):10.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make failopen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--json", type=Path, help="write every cycle to this file")
    parsed = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvstore-failopen-") as folder:
        cycles = run(Path(folder), parsed.cycles, parsed.seed)
    if parsed.json:
        parsed.json.write_text(json.dumps([vars(done) for done in cycles]))
    counts = problems(cycles, LATE_MS_MAX, RECOVERY_S_MAX)
    print(f"{table(cycles)}\n\n{calls_table(cycles)}\n")
    print(f"{len(cycles):,} cycles, {time.monotonic() - began_s:.0f} s; a bare sleep was at most "
          f"{max(done.found['sleep_late_ms'] for done in cycles):.1f} ms late")  # fmt: skip
    print(", ".join(f"{more:+,} {name}" for name, more in growth(cycles).items()))
    for name, count in counts.items():
        print(f"{count:10,} {name}")
    sys.exit(any(counts.values()))


if __name__ == "__main__":
    main()
