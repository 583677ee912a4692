"""One client process of the soak: conversations that grow, every call timed, every value that comes compared.

`python -m bench.soak_client ADDRESS SEED DEADLINE_S` until stdin ends; a JSON line (`Second`) on stdout every second.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from oracle import CHUNK_TOKENS, LAYOUT, QUALITIES, Conversation
from prometheus_client import CollectorRegistry

from kvstore_client import Client
from kvstore_codec import Quality

SLACK_S = 0.05  # beyond a call's deadline
ACTIVE = 150  # conversations at a time, of all clients together: client processes meet in them
SYSTEMS = 8  # starts that conversations share
CHUNKS_MAX = 14
PAUSE_S = 0.01  # a turn; also what keeps clients from spinning while there is no node
R = TypeVar("R")


@dataclass
class Second:
    """What one client did in about a second. `asked`, `hit`: chunks of gets. `hung`: calls that ended more than SLACK_S
    after their deadline; `wrong`: chunks whose values nobody put. `held_up_s`: the longest that this process itself was
    late for an alarm of its own: what the machine, not the node, kept waiting."""

    calls: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    hit: int = 0
    stored: int = 0
    rejected: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    hung: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    held_up_s: float = 0.0


class Talker:
    def __init__(self, address: str, seed: int, deadline_s: float) -> None:
        self._rng = random.Random(seed)
        self._deadline_s = deadline_s
        self._client = Client(address, deadline=deadline_s, registry=CollectorRegistry())
        self._cache = self._client.namespace(LAYOUT)
        self._lengths = [self._rng.randint(2, 5) for _ in range(ACTIVE)]
        self._rounds = [0] * ACTIVE
        self.second = Second()

    def turn(self) -> None:
        """One turn of a conversation: what is stored of it is read, what is missing is stored, and it grows."""
        rng = self._rng
        place = min(int(rng.paretovariate(0.5)) - 1, ACTIVE - 1)  # some talk much more than others
        chunks = self._lengths[place]
        talk = Conversation(place + ACTIVE * self._rounds[place], systems=SYSTEMS)
        tokens = talk.tokens(chunks)
        if rng.random() < 0.3:
            hit = self._timed("lookup", lambda: self._cache.lookup(tokens, lease_ms=rng.choice((0, 500, 5000))))
            self.second.tiers.update(chunk.tier for chunk in hit.chunks)
        quality = rng.choice(QUALITIES)
        values, held = self._timed("get", lambda: self._cache.get(tokens, quality=quality))
        self.second.asked += chunks
        self.second.hit += held // CHUNK_TOKENS
        self.second.wrong += len(talk.wrong_chunks(values, held, Quality.parse(quality)))
        if rng.random() < 0.8:
            first = held // CHUNK_TOKENS if rng.random() < 0.7 else 0
            kv = talk.kv(chunks)[:, :, first * CHUNK_TOKENS :]
            quality = rng.choice(QUALITIES)
            stored = self._timed(
                "put", lambda: self._cache.put(tokens, kv, quality=quality, first_token=first * CHUNK_TOKENS)
            )
            self.second.stored += stored.stored
            self.second.rejected += stored.rejected
        if rng.random() < 0.01:
            self._timed("delete", lambda: self._cache.delete(tokens))
        self._grow(place)

    def report(self) -> None:
        done, self.second = self.second, Second()
        print(json.dumps(vars(done)), flush=True)

    def _grow(self, place: int) -> None:
        self._lengths[place] += self._rng.randint(0, 2)
        if self._lengths[place] > CHUNKS_MAX:
            self._lengths[place] = self._rng.randint(2, 5)
            self._rounds[place] += 1

    def _timed(self, call: str, function: Callable[[], R]) -> R:
        began_s = time.monotonic()
        result = function()
        took_s = time.monotonic() - began_s
        self.second.calls[call] += 1
        self.second.slowest_s = max(self.second.slowest_s, took_s)
        if took_s > self._deadline_s + SLACK_S:
            self.second.hung.append(f"{call} {took_s:.3f} s")
        return result


def watch(talker: Talker, stop: threading.Event) -> None:
    """Notes how late this process wakes up."""
    while not stop.is_set():
        began_s = time.monotonic()
        stop.wait(0.01)
        talker.second.held_up_s = max(talker.second.held_up_s, time.monotonic() - began_s - 0.01)


def main(address: str, seed: int, deadline_s: float) -> None:
    stop = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    talker = Talker(address, seed, deadline_s)
    threading.Thread(target=watch, args=(talker, stop), daemon=True).start()
    report_at_s = time.monotonic() + 1
    while not stop.is_set():
        talker.turn()
        if time.monotonic() > report_at_s:
            talker.report()
            report_at_s = time.monotonic() + 1
        stop.wait(PAUSE_S)
    talker.report()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
