"""The client process of failopen: makes all calls while its driver (failopen.py) has a fault under way.

python -m failopen_client GRPC_ADDRESS, then lines of JSON on stdin and stdout: for each cycle

    > {"transport": …, "strict": …, "deadline_s": …, "number": …}     the cycle begins, its clients get a hit
    < {"ready": true}         the first round of calls begins: the fault comes in the middle of it
    > {"injected": true}      the second round begins when the first has ended
    < {"done": true}
    > {"healed_s": …}         the machine's clock; gets until there is a hit
    < {…}                     what was found: `Cycle`
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from failopen_calls import HELD, HELD_CHUNKS, Ask, Record, Side, Took, is_right, run, run_async, tokens_of, untouched
from prometheus_client import CollectorRegistry

from kvstore_client import AsyncClient, Client, KvClientError
from kvstore_client.client import _started_loop  # the loop of all sync clients

TRANSPORTS = ("grpc", "tcp", "unix", "shm", "auto")
FIRST_HIT_S_MAX = 10.0  # for clients whose node is well
RECOVERY_S_MAX = 10.0  # after which we stop asking
POLL_DEADLINE_S, POLL_PAUSE_S = 0.25, 0.005
ROUND_CALLS = 16  # threads; more than there are calls in a round
WATCH_S = 0.005


@dataclass
class Cycle:
    """`late_ms`: of each call the latest step beyond its deadline, and the same less what the machine kept it waiting
    (Watchdog). `recovery_s`: from the peer's return to the first hit, of the sync and the async client."""

    ways: int = 0  # clients that began over a bulk path
    calls: int = 0
    late_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    sleep_late_ms: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    stat_errors: int = 0  # the one call that raises also where the client is not strict
    counts: Counter[str] = field(default_factory=Counter)
    untyped: list[str] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    #: of the process: pools of clients' threads, threads that are in none, descriptors, tasks of both event loops,
    #: mappings of nodes' memory, memory of its own
    resources: dict[str, int] = field(default_factory=dict)


class Watchdog:
    """What the machine, not the client, keeps waiting: how much later than asked a bare sleep of this process ends, and
    how long the threads of its two event loops were ready to run and did not."""

    def __init__(self, loop_threads: Sequence[int]) -> None:
        self._schedules = [Path(f"/proc/self/task/{each}/schedstat") for each in loop_threads]
        self._wakes: deque[tuple[float, float, float]] = deque(maxlen=8000)
        threading.Thread(target=self._watch, daemon=True).start()

    def held_up_s(self, began_s: float, ended_s: float) -> tuple[float, float]:
        """(the latest sleep, the waiting for a core) between two moments."""
        wakes = [wake for wake in list(self._wakes) if wake[1] > began_s and wake[0] < ended_s]
        if not wakes:
            return 0.0, 0.0
        return max(woke - slept - WATCH_S for slept, woke, _ in wakes), wakes[-1][2] - wakes[0][2]

    def _watch(self) -> None:
        never = threading.Event()
        while True:
            slept_s = time.monotonic()
            never.wait(WATCH_S)
            waited_s = sum(int(schedule.read_text().split()[1]) for schedule in self._schedules) / 1e9
            self._wakes.append((slept_s, time.monotonic(), waited_s))


class Caller:
    """Two clients of each kind, strict and not, for each transport; they live as long as this process."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._sides: dict[tuple[str, bool], tuple[Side, Side]] = {}
        self._threads = ThreadPoolExecutor(ROUND_CALLS)
        self._watchdog = Watchdog([threading.get_native_id(), _sync_loop_thread()])
        self._lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, daemon=True).start()

    async def serve(self) -> None:
        while command := await self._lines.get():
            _say(vars(await self._cycle(**command)))
        for side, async_side in self._sides.values():
            side.client.close()
            await async_side.client.aclose()
        self._threads.shutdown()

    async def _cycle(self, *, transport: str, strict: bool, deadline_s: float, number: int) -> Cycle:
        cycle = Cycle()
        sides = self._sides_of(transport, strict)
        began_s = time.monotonic()
        await asyncio.gather(*(self._first_hit(side, began_s, FIRST_HIT_S_MAX) for side in sides))
        for side in sides:
            if transport != "grpc" and not has_bulk_path(side):  # the hit came by gRPC instead of a path that had gone
                await self._first_hit(side, time.monotonic(), FIRST_HIT_S_MAX)
        cycle.ways = sum(has_bulk_path(side) for side in sides)
        _say({"ready": True})
        outs: list[Any] = []
        record = await self._round(sides, deadline_s, number, outs)
        await self._lines.get()
        again = await self._round(sides, deadline_s, number + 4, outs)
        _say({"done": True})
        healed_s = (await self._lines.get())["healed_s"]
        cycle.recovery_s = await asyncio.gather(*(self._first_hit(side, healed_s, RECOVERY_S_MAX) for side in sides))
        cycle.counts = record.counts + again.counts
        cycle.counts["touched"] += not untouched(outs)
        self._judge(cycle, [*record.took, *again.took])
        for error in (*record.untyped, *again.untyped):
            traceback.print_exception(error)
            cycle.untyped.append(repr(error))
        cycle.resources = _resources(self._loop)
        return cycle

    def _sides_of(self, transport: str, strict: bool) -> tuple[Side, Side]:
        if (transport, strict) not in self._sides:
            options: dict[str, Any] = {"strict": strict, "transport": transport}
            self._sides[transport, strict] = (
                Side.of(Client(self._address, registry=CollectorRegistry(), **options), asynchronous=False),
                Side.of(AsyncClient(self._address, registry=CollectorRegistry(), **options), asynchronous=True),
            )
        return self._sides[transport, strict]

    async def _round(self, sides: Sequence[Side], deadline_s: float, number: int, outs: list[Any]) -> Record:
        """All calls of both clients at once."""
        record = Record()
        side, async_side = sides
        ask = Ask(side, deadline_s, number, record, outs)
        async_ask = Ask(async_side, deadline_s, number + 2, record, outs)
        await asyncio.gather(
            *(self._loop.run_in_executor(self._threads, run, call(), ask) for call in ask.calls().values()),
            *(run_async(call(), async_ask) for call in async_ask.calls().values()),
        )
        return record

    async def _first_hit(self, side: Side, since_s: float, limit_s: float) -> float:
        """Seconds from `since_s` until all that is held is got; no more than `limit_s` where it is not."""
        tokens = tokens_of(HELD, HELD_CHUNKS)
        while time.monotonic() < since_s + limit_s:
            try:
                if side.advance == "__anext__":
                    kv, n = await side.cache.get(tokens, deadline=POLL_DEADLINE_S)
                else:
                    get = side.cache.get
                    kv, n = await asyncio.to_thread(get, tokens, deadline=POLL_DEADLINE_S)
            except KvClientError:
                n = 0
            if n == len(tokens):
                if not is_right(kv, n, HELD, HELD_CHUNKS):
                    raise AssertionError("wrong values from a node that is well")
                return time.monotonic() - since_s
            await asyncio.sleep(POLL_PAUSE_S)
        return limit_s

    def _judge(self, cycle: Cycle, took: Sequence[Took]) -> None:
        cycle.calls = len(took)
        for each in took:
            slept_s, waited_s = self._watchdog.held_up_s(each.began_s, each.ended_s)
            late_ms, beyond_ms = each.late_s * 1e3, (each.late_s - max(slept_s, waited_s)) * 1e3
            known = cycle.late_ms.get(each.name, (late_ms, beyond_ms))
            cycle.late_ms[each.name] = max(known[0], late_ms), max(known[1], beyond_ms)
            cycle.sleep_late_ms = max(cycle.sleep_late_ms, slept_s * 1e3)
            if each.error:
                cycle.errors[each.error] += 1
                cycle.stat_errors += each.name == "stat"

    def _read(self) -> None:
        for line in sys.stdin:
            self._loop.call_soon_threadsafe(self._lines.put_nowait, json.loads(line))
        self._loop.call_soon_threadsafe(self._lines.put_nowait, {})


def has_bulk_path(side: Side) -> bool:
    """Whether its next call goes over one; nothing public says so, and a run over gRPC alone would prove little."""
    session = side.cache._session if side.advance == "__anext__" else side.cache._async._session
    return any(len(node.bulk.ready) for node in session.connections._nodes.values())


def _resources(loop: asyncio.AbstractEventLoop) -> dict[str, int]:
    process = Path("/proc/self")
    status = (process / "status").read_text().splitlines()
    (rss_kib,) = (int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    # A pool takes hours to fill up: how many of its threads there are is how many were ever needed at once.
    pooled = [each.name for each in threading.enumerate() if each.name.startswith("kvstore-")]
    return {
        "pools": sum(name.endswith("_0") for name in pooled),
        "threads": len(list((process / "task").iterdir())) - len(pooled),
        "descriptors": len(list((process / "fd").iterdir())),
        "tasks": len(asyncio.all_tasks(loop)) + len(asyncio.all_tasks(_started_loop()[0])),
        "mappings": (process / "maps").read_text().count("memfd"),
        "rss_bytes": rss_kib * 1024,
    }


def _sync_loop_thread() -> int:
    """Of all sync clients."""

    async def which() -> int:
        return threading.get_native_id()

    return asyncio.run_coroutine_threadsafe(which(), _started_loop()[0]).result()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


async def main(address: str) -> None:
    logging.getLogger("kvstore_client").setLevel(logging.ERROR)  # its warnings are what is to be expected
    await Caller(address).serve()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
