"""Chaos under a real vLLM engine: its node, or its sidecar and the sidecar's node, fail while it loads and saves.

Real processes: an engine (vllm_engine.py), a relay before every address of each place (fault_relay.py), the places. The
engine answers batches of requests, some for prompts that are stored and some for new ones; in every other batch one
place fails, from the start or at a random moment, until the batch is answered. What must not be:

- wrong: a request without its answer, or with other tokens than those of an engine of its own (prefix caching, the same
  blocks);
- late: a request that waited for a lookup or a load longer than the connector's bounds, and the engine's longest step
  of that batch, after which it is noticed;
- leaks: blocks, staging pages, requests, loads or saves that are still held when all is over;
- no recovery: a place that is back, and from which a prompt is not loaded, asked for again and again, within two
  seconds and one request that is cut off; or a prompt that a calm batch stored and the next one does not load.

All in float32: there is no near-tie that falls otherwise where a prompt is computed in other pieces. `make vllm-chaos`.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import relayed_node
from fault_relay import FaultRelay
from node_process import NodeProcess
from polling import wait_until
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from kvstore.demo import model

FAULTS = ("kill -9", "stop", "flip", "garbage", "reset", "blackhole", "dribble")
PROBLEMS = ("wrong", "late", "leaks", "no recovery")
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 12, 2 * BLOCK_TOKENS + 40, 6
BATCH = 4
LOOKUP_S, DEADLINE_S = 1.0, 3.0
SLACK_S = 1.0  # for a busy machine to run our threads
FAULT_AFTER_S_MAX = 0.8
RECOVERY_S_MAX = 2.0 + LOOKUP_S + DEADLINE_S
PAUSE_S = 0.001  # of the relays, after 64 KiB: a load takes as long as over a link, so that faults meet it
QUIET_S_MAX = 60.0


@dataclass(frozen=True)
class Reference:
    """What an engine of its own makes of each prompt, the second time, and the least gap between likeliest tokens."""

    prompts: list[list[int]]
    answers: list[list[int]]
    gap: float

    @classmethod
    def measured(cls, folder: Path) -> Reference:
        tokens = AutoTokenizer.from_pretrained(model.model_folder(CACHE))(TEXT * 6).input_ids
        prompts = [tokens[61 * number : 61 * number + PROMPT_TOKENS] for number in range(PROMPTS)]
        engine = EngineProcess(folder / "reference.log", None, dtype="float32")
        try:
            engine.generate(prompts, 1)
            native = engine.generate(prompts, ANSWER_TOKENS, gaps=True)
        finally:
            engine.kill()
        assert native["cached"] == [2 * BLOCK_TOKENS] * PROMPTS
        return cls(prompts, native["tokens"], min(gap for gaps in native["gaps"] for gap in gaps))


class Place:
    """A node or a sidecar behind a relay of its own, with a disk that outlives its process."""

    def __init__(self, folder: Path, role: str, *flags: str) -> None:
        self.role, self._flags = role, flags
        self._folder = folder / role
        self._folder.mkdir()
        self.relay = FaultRelay(self._folder, PAUSE_S)
        self._start()

    def inject(self, fault: str) -> None:
        if fault == "kill -9":
            self._node.kill()
            self.relay.inject("refuse")
        elif fault == "stop":
            self._node.process.send_signal(signal.SIGSTOP)
        else:
            self.relay.inject(fault)

    def heal(self, fault: str) -> None:
        if fault == "stop":
            self._node.process.send_signal(signal.SIGCONT)
            return
        if fault == "kill -9":
            self._start()
        self.relay.heal()

    def close(self) -> None:
        self._node.kill()
        self.relay.close()

    def _start(self) -> None:
        into = self._folder / "addresses"
        environment = (f"RELAYED_AT={','.join(self.relay.addresses[1:])}", f"RELAYED_INTO={into}")
        own = self._folder / f"{time.monotonic_ns()}.sock"
        self._node = NodeProcess(
            self._folder, "--bulk-listen", f"127.0.0.1:0,unix:{own}", "--host-capacity", "1GiB", "--disk-path",
            str(self._folder / "disk"), "--disk-capacity", "4GiB", "--log-level", "warning", *self._flags,
            command=("env", *environment, sys.executable, relayed_node.__file__),
            role="serve" if self.role == "node" else self.role,
        )  # fmt: skip
        self.relay.point([self._node.address, *into.read_text().split("\n")])


@dataclass
class Batch:
    """`place` and `fault`: of none, in a calm one. `recovery_s`: from the place's return to the request that was
    loaded. `wrong`, `missed`: requests that were answered wrongly, or should have been loaded and were not."""

    number: int
    place: str = ""
    fault: str = ""
    seconds: float = 0.0
    slowest_step_s: float = 0.0
    lookup_s: float = 0.0
    load_s: float = 0.0
    recovery_s: float = 0.0
    requests: int = BATCH
    cached: int = 0
    wrong: int = 0
    missed: int = 0

    @property
    def is_late(self) -> bool:
        """A wait is noticed by the step after its end, and both bounds may be met by one request."""
        slack_s = self.slowest_step_s + SLACK_S
        return self.lookup_s > LOOKUP_S + slack_s or self.load_s > DEADLINE_S + slack_s


@dataclass
class Run:
    batches: list[Batch] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)

    def problems(self) -> Counter[str]:
        """How often each of PROBLEMS was, none of which should be."""
        return Counter({
            "wrong": sum(batch.wrong for batch in self.batches),
            "late": sum(batch.is_late for batch in self.batches),
            "leaks": sum(self.before[name] != self.after[name] for name in self.before),
            "no recovery": sum(batch.missed for batch in self.batches),
        })  # fmt: skip

    def outcomes(self, kind: str) -> dict[str, int]:
        """Of lookups, loads or saves: outcome → how many."""
        start = f"kvstore_vllm_{kind}_total{{"
        return {n[len(start) : -1]: int(v) for n, v in self.counters.items() if n.startswith(start)}

    def failures(self, call: str) -> dict[str, int]:
        """Of the client's calls of this name: reason → how many."""
        start = f"kvstore_client_failures_total{{{call},"
        return {n[len(start) : -1]: int(v) for n, v in self.counters.items() if n.startswith(start)}

    def table(self) -> str:
        """By place and fault: seconds of the longest waits, of a step, of a batch, and until it was back."""
        most = ("lookup_s", "load_s", "slowest_step_s", "seconds", "recovery_s")
        lines = [f"{'':20} requests  cached  lookup    load    step   batch    back"]
        for place, fault in dict.fromkeys((batch.place, batch.fault) for batch in self.batches):
            some = [batch for batch in self.batches if (batch.place, batch.fault) == (place, fault)]
            lines.append(
                f"{place or '-':9} {fault or '-':10} {sum(batch.requests for batch in some):8} "
                f"{sum(batch.cached for batch in some):7,}"
                + "".join(f" {max(getattr(batch, name) for batch in some):7.2f}" for name in most)
            )
        outcomes = (f"{kind}: {self.outcomes(kind)}" for kind in ("lookups", "loads", "saves"))
        failures = (f"failures of {call}s: {self.failures(call)}" for call in ("lookup", "get", "put"))
        return "\n".join([*lines, *outcomes, *failures, f"before: {self.before}", f"after:  {self.after}"])


class Chaos:
    """`roles`: "node", or "node" and "sidecar"; the engine talks to the last of them."""

    def __init__(self, folder: Path, roles: Sequence[str], reference: Reference, seed: int) -> None:
        self._rng, self._reference = random.Random(seed), reference
        self._stored: list[tuple[int, str]] = []  # prompts and salts that calm batches have stored
        self._salts = 0
        self._places: list[Place] = []
        try:
            for role in roles:
                upstream = ("--upstream", self._places[-1].relay.addresses[0]) if self._places else ()
                self._places.append(Place(folder, role, *upstream))
            transfer = kv_transfer(
                # Without a planner: after a fault it computes for a while, and nothing would be loaded under the next.
                self._places[-1].relay.addresses[0], lookup_s=LOOKUP_S, deadline_s=DEADLINE_S, planner=False,
                transport="grpc" if len(roles) == 1 else "auto",
            )  # fmt: skip
            self.engine = EngineProcess(folder / "engine.log", transfer, dtype="float32")
        except BaseException:
            self._close_places()
            raise

    def run(self, requests: int) -> Run:
        found = Run(before=self.engine.held())
        faults = [(place, fault) for fault in FAULTS for place in self._places]
        for number in range(-(-requests // BATCH)):
            place, fault = faults[number // 2 % len(faults)] if number % 2 else (None, "")
            found.batches.append(self._batch(number, place, fault))
        found.batches.append(self._batch(len(found.batches), None, ""))
        self._wait_quiet()
        found.after, found.counters = self.engine.held(), self.engine.counters()
        return found

    def close(self) -> None:
        self.engine.kill()
        self._close_places()

    def _batch(self, number: int, place: Place | None, fault: str) -> Batch:
        """Half of it was stored by the calm batch before, where there was one."""
        asked = self._stored[-BATCH // 2 :]
        expected = len(asked) if place is None else 0
        asked += [self._new() for _ in range(BATCH - len(asked))]
        self.engine.reset()
        # Every third fault is there before the lookups, the others come while the batch is under way.
        is_first = place is not None and number // 2 % 3 == 2
        if place is not None and is_first:
            place.inject(fault)
        began_s = time.monotonic()
        self.engine.send([self._reference.prompts[p] for p, _ in asked], ANSWER_TOKENS, [salt for _, salt in asked])
        if place is not None and not is_first:
            threading.Event().wait(self._rng.uniform(0, FAULT_AFTER_S_MAX))
            place.inject(fault)
        try:
            answer = self.engine.answer()
            seconds = time.monotonic() - began_s
        finally:
            if place is not None:
                place.heal(fault)
        batch = Batch(
            number, place.role if place else "", fault, seconds, answer["slowest_step_s"], answer["lookup_s"],
            answer["load_s"], cached=sum(answer["cached"]), wrong=self._wrong(asked, answer),
            missed=sum(cached != 2 * BLOCK_TOKENS for cached in answer["cached"][:expected]),
        )  # fmt: skip
        if place is None:
            self._wait_quiet()
            self._stored = asked
        else:
            self._recover(batch)
        return batch

    def _recover(self, batch: Batch) -> None:
        """Asks for a stored prompt until it is loaded. What is computed meanwhile is stored again."""
        prompt, salt = self._stored[-1]
        healed_s, cached = time.monotonic(), 0
        while cached != 2 * BLOCK_TOKENS and batch.recovery_s <= RECOVERY_S_MAX:
            batch.recovery_s = time.monotonic() - healed_s
            self.engine.reset()
            answer = self.engine.generate([self._reference.prompts[prompt]], ANSWER_TOKENS, [salt])
            batch.requests += 1
            batch.wrong += self._wrong([(prompt, salt)], answer)
            cached = answer["cached"][0]
        batch.missed += cached != 2 * BLOCK_TOKENS

    def _new(self) -> tuple[int, str]:
        self._salts += 1
        return self._rng.randrange(PROMPTS), f"salt {self._salts}"

    def _wrong(self, asked: Sequence[tuple[int, str]], answer: dict[str, Any]) -> int:
        right = [self._reference.answers[prompt] for prompt, _ in asked]
        got = list(zip(answer["tokens"], answer["reasons"], strict=True))
        return sum(given != (tokens, "length") for given, tokens in zip(got, right, strict=True))

    def _wait_quiet(self) -> None:
        def is_quiet() -> bool:
            held = self.engine.held()
            return held["saves"] == held["loads"] == 0

        wait_until(is_quiet, "saves have ended", deadline_s=QUIET_S_MAX)

    def _close_places(self) -> None:
        for place in self._places:
            place.close()


def run(folder: Path, roles: Sequence[str], reference: Reference, requests: int, seed: int) -> Run:
    chaos = Chaos(folder, roles, reference, seed)
    try:
        return chaos.run(requests)
    finally:
        chaos.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make vllm-chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=400, help="of each arrangement")
    parser.add_argument("--seed", type=int, default=20261)
    given = parser.parse_args()
    is_bad = False
    with tempfile.TemporaryDirectory(prefix="kvstore-chaos-") as name:
        folder = Path(name)
        reference = Reference.measured(folder)
        print(f"least gap between the two likeliest tokens: {reference.gap:.4f} nats")
        for roles in (["node"], ["node", "sidecar"]):
            (inside := folder / "-".join(roles)).mkdir()
            found = run(inside, roles, reference, given.requests, given.seed)
            print(f"\n{' behind '.join(roles)}\n{found.table()}\n{dict(found.problems())}", flush=True)
            is_bad |= any(found.problems().values())
    sys.exit(is_bad)


if __name__ == "__main__":
    main()
