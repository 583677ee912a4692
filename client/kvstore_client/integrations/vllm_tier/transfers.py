"""Lookups, loads and stores of the tier: what vLLM asks for, in threads. Nothing of vLLM is imported.

A load decodes straight into rows, a store encodes straight from them; vLLM keeps both for the job until it is reported
finished. Every job ends within `deadline_s` of its submission, so rows are never held for longer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from kvstore_client.circuit import Circuit
from kvstore_client.client import Namespace
from kvstore_client.deadline import Deadline
from kvstore_client.engine_hashes import EngineHashes
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm_tier.chain import Chain, runs
from kvstore_client.integrations.vllm_tier.counts import Counts
from kvstore_client.integrations.vllm_tier.rows import Rows
from kvstore_client.lookups import good_enough
from kvstore_codec import Quality

LOADS_MAX = 4  # at a time
LEASE_MS = 10_000
#: One lookup that nobody answered is enough for a pause: vLLM asks in one thread, so all behind it wait as well.
FAILURES_MAX = 1
PAUSE_S_MAX = 2.0


@dataclass(frozen=True)
class Job:
    """`numbers`: of its chunks in the prompt `chain`; `chunk_ids`: their rows."""

    job_id: int
    chain: Chain
    numbers: Sequence[int]
    chunk_ids: Sequence[int]
    is_load: bool
    limit: Deadline
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Ended:
    """`good`: chunks of the job that were loaded, or are stored, from its first on."""

    job: Job
    good: int
    seconds: float

    @property
    def whole(self) -> bool:
        return self.good == len(self.job.numbers)


class Transfers:
    """`lookup` may be called from one other thread; all else from one thread."""

    def __init__(self, namespace: Namespace, rows: Rows, config: ConnectorConfig, counts: Counts) -> None:
        self._namespace, self._rows, self._config, self._counts = namespace, rows, config, counts
        self._quality = Quality.parse(config.quality)
        self._chunk_tokens = namespace.layout.chunk_tokens
        self._jobs: dict[int, tuple[Job, Future[Ended]]] = {}
        self._load_threads = ThreadPoolExecutor(LOADS_MAX, "kvstore-tier-load")
        self._store_thread = ThreadPoolExecutor(1, "kvstore-tier-store")  # one: a chunk goes before what follows it
        self._circuit = Circuit(time.monotonic, random.Random(), FAILURES_MAX, PAUSE_S_MAX)

    def lookup(self, chain: Chain, numbers: Sequence[int]) -> list[bool]:
        """Whether the node holds each of these chunks, well enough. One that is away holds none."""
        if not self._circuit.allow():
            self._counts.add("lookup", "paused", len(numbers))
            return [False] * len(numbers)
        limit = Deadline(self._config.lookup_s)
        found: list[bool] = []
        for run in runs(numbers):
            asked = numbers[run]
            held = 0
            if limit.remaining() > 0:
                hit = self._namespace.lookup(
                    self._prompt(chain, asked[-1]), first_token=asked[0] * self._chunk_tokens, lease_ms=LEASE_MS,
                    deadline=limit.remaining(),
                )  # fmt: skip
                held = len(good_enough(hit.chunks, self._quality))
            found += [True] * held + [False] * (len(asked) - held)
        if limit.remaining() <= 0 and not any(found):
            self._circuit.fail()
            self._counts.log.warn("lookup", "silent", f"no answer in {self._config.lookup_s} s: misses for a while")
        else:
            self._circuit.succeed()
        self._counts.add("lookup", "hit", sum(found))
        self._counts.add("lookup", "miss", len(found) - sum(found))
        return found

    def submit(
        self, job_id: int, chain: Chain, numbers: Sequence[int], chunk_ids: Sequence[int], *, is_load: bool
    ) -> None:
        """Begins a load or a store."""
        job = Job(job_id, chain, numbers, chunk_ids, is_load, Deadline(self._config.deadline_s))
        ended = self._load_threads.submit(self._load, job) if is_load else self._store_thread.submit(self._store, job)
        self._jobs[job_id] = (job, ended)

    def ended(self) -> list[Ended]:
        """Jobs that have ended since the last call. Nothing reads or writes their rows any more."""
        over = [(job, future) for job, future in self._jobs.values() if future.done()]
        return [self._result(job, future) for job, future in over]

    def drain(self) -> None:
        """Returns when every job has ended."""
        wait([future for _, future in self._jobs.values()])

    def close(self) -> None:
        """Those under way end, the others are dropped."""
        for pool in (self._load_threads, self._store_thread):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._load_threads, self._store_thread):
            pool.shutdown(wait=True)

    def _result(self, job: Job, future: Future[Ended]) -> Ended:
        del self._jobs[job.job_id]
        operation = "load" if job.is_load else "store"
        problem = None if future.cancelled() else future.exception()
        if not future.cancelled() and problem is None:
            return future.result()
        self._counts.add(operation, "missed" if job.is_load else "failed", len(job.numbers))
        reason = "CancelledError" if problem is None else type(problem).__name__
        self._counts.log.warn(operation, reason, str(problem or "the engine shut down"))
        return Ended(job, 0, time.monotonic() - job.began)

    def _load(self, job: Job) -> Ended:
        """In a thread. What follows the first chunk that is missing is of no use to the prompt."""
        good = 0
        for run in runs(job.numbers):
            if job.limit.remaining() <= 0:
                break
            room = self._rows.kv(job.chunk_ids[run])
            _, tokens = self._namespace.get(
                self._prompt(job.chain, job.numbers[run][-1]), first_token=job.numbers[run][0] * self._chunk_tokens,
                min_quality=self._quality, out=room, deadline=job.limit.remaining(),
            )  # fmt: skip
            good += tokens // self._chunk_tokens
            if tokens < room.tokens:
                break
        self._counts.add("load", "loaded", good)
        self._counts.add("load", "missed", len(job.numbers) - good)
        return Ended(job, good, time.monotonic() - job.began)

    def _store(self, job: Job) -> Ended:
        """In a thread."""
        good = 0
        for run in runs(job.numbers):
            count = len(job.numbers[run])
            if job.limit.remaining() <= 0:
                self._counts.add("store", "late", count)
                continue
            result = self._namespace.put(
                self._prompt(job.chain, job.numbers[run][-1]), self._rows.kv(job.chunk_ids[run]),
                quality=self._quality, provenance=self._config.provenance,
                first_token=job.numbers[run][0] * self._chunk_tokens, deadline=job.limit.remaining(),
            )  # fmt: skip
            for outcome in ("stored", "have", "rejected"):
                self._counts.add("store", outcome, getattr(result, outcome))
            good += count - result.rejected
        return Ended(job, good, time.monotonic() - job.began)

    def _prompt(self, chain: Chain, last: int) -> EngineHashes:
        return EngineHashes(chain.hashes[: last + 1], self._chunk_tokens)
