"""Every public call of a client, for failopen: each as a generator of steps, so that one text serves both clients.

A step is (name, function); what it is answered is the function's result, awaited where the client is asynchronous. Each
step has the call's deadline. Values that come are compared, whatever happens: a miss is fine, another value never.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import kv_objects
import numpy as np

import kvstore_codec as codec
from kvstore_client import KvClientError

LAYOUT = kv_objects.small_layout("failopen", layers=8, head_dim=64)  # 64 KiB a chunk, raw
HELD, HELD_CHUNKS = 0, 8  # the prompt that nodes hold from the start
PUT_CHUNKS = 64  # 4 MiB: more than sockets take when nobody reads
WRITER_CHUNKS = 8
_STARTS = 1009  # prompts' values begin at different places of one long run of values
_MARK = 7.0
Step = tuple[str, Callable[[], Any]]
Steps = Generator[Step, Any, None]


def _all_values() -> Any:
    tokens = _STARTS + PUT_CHUNKS * LAYOUT.chunk_tokens
    values = codec.empty(LAYOUT, tokens)
    values[...] = np.random.default_rng(11).standard_normal(values.shape, np.float32).astype(values.dtype)
    return values


_VALUES = _all_values()


def tokens_of(number: int, chunks: int) -> list[int]:
    """Of prompt `number`, which shares its first chunk with no other."""
    first = number * PUT_CHUNKS * LAYOUT.chunk_tokens
    return [(first + at) % 2**32 for at in range(chunks * LAYOUT.chunk_tokens)]


def kv_of(number: int, chunks: int) -> Any:
    """Its values, a view; numbers that are close have different ones."""
    first = number % _STARTS
    return _VALUES[:, :, first : first + chunks * LAYOUT.chunk_tokens]


def is_right(kv: Any, tokens: int, number: int, chunks: int) -> bool:
    expected = kv_of(number, chunks)[:, :, :tokens]
    return not tokens % LAYOUT.chunk_tokens and np.array_equal(kv.view(np.uint16), expected.view(np.uint16))


class Took(NamedTuple):
    """One step: seconds on the machine's clock; `late_s`: beyond its deadline. `error`: the type of what it raised."""

    name: str
    began_s: float
    ended_s: float
    late_s: float
    error: str


@dataclass
class Record:
    """What the calls of one round found, of all threads."""

    took: list[Took] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    untyped: list[BaseException] = field(default_factory=list)

    def step(self, name: str, began_s: float, deadline_s: float, error: BaseException | None) -> None:
        ended_s = time.monotonic()
        kind = "" if error is None else type(error).__name__
        self.took.append(Took(name, began_s, ended_s, ended_s - began_s - deadline_s, kind))
        if error is not None and not isinstance(error, KvClientError):
            self.untyped.append(error)

    def values(self, kv: Any, tokens: int, number: int, chunks: int) -> None:
        """That what came is what was put."""
        self.counts["hit" if tokens == chunks * LAYOUT.chunk_tokens else "partial" if tokens else "miss"] += 1
        self.counts["wrong"] += not is_right(kv, tokens, number, chunks)


@dataclass(frozen=True)
class Side:
    """One client: its namespace, and how an object of it is entered, left and advanced."""

    client: Any
    cache: Any
    enter: str
    leave: str
    advance: str

    @classmethod
    def of(cls, client: Any, *, asynchronous: bool) -> Side:
        names = ("__aenter__", "__aexit__", "__anext__") if asynchronous else ("__enter__", "__exit__", "__next__")
        return cls(client, client.namespace(LAYOUT), *names)


@dataclass(frozen=True)
class Ask:
    """One round of calls. `number`: of the first of the two prompts that it puts."""

    side: Side
    deadline_s: float
    number: int
    record: Record
    outs: list[Any]  # the arrays that gets were given, for `untouched`

    def calls(self) -> dict[str, Callable[[], Steps]]:
        return {
            "lookup": self._lookup, "get": self._get, "get out": self._get_out, "plan": self._plan,
            "prefetch": self._prefetch, "stream": self._stream, "put": self._put, "writer": self._writer,
            "delete": self._delete, "stat": self._stat,
        }  # fmt: skip

    def _lookup(self) -> Steps:
        cache = self.side.cache
        hit = yield "lookup", lambda: cache.lookup(self._held, lease_ms=1000, deadline=self.deadline_s)
        yield "renew", lambda: cache.renew(hit, lease_ms=0, deadline=self.deadline_s)

    def _get(self) -> Steps:
        kv, tokens = yield "get", lambda: self.side.cache.get(self._held, deadline=self.deadline_s)
        self.record.values(kv, tokens, HELD, HELD_CHUNKS)

    def _get_out(self) -> Steps:
        out = codec.empty(LAYOUT, HELD_CHUNKS * LAYOUT.chunk_tokens)
        self.outs.append(out)
        try:
            kv, tokens = yield "get out", lambda: self.side.cache.get(self._held, out=out, deadline=self.deadline_s)
            self.record.values(kv, tokens, HELD, HELD_CHUNKS)
        finally:
            out[...] = _MARK  # from now on nobody else may write to it

    def _plan(self) -> Steps:
        yield (
            "plan",
            lambda: self.side.cache.plan(
                self._held, ttft=self.deadline_s, prefill_tokens_per_s=8000, deadline=self.deadline_s
            ),
        )

    def _prefetch(self) -> Steps:
        yield "prefetch", lambda: self.side.cache.prefetch(self._held, deadline=self.deadline_s)

    def _stream(self) -> Steps:
        stream = self.side.cache.stream(self._held, deadline=self.deadline_s)
        expected = kv_of(HELD, HELD_CHUNKS)
        for layer in range(LAYOUT.num_layers + 1):
            try:
                at, k, v = yield "stream", getattr(stream, self.side.advance)
            except (StopIteration, StopAsyncIteration):
                break
            tokens = stream.tokens
            right = at == layer and np.array_equal(k, expected[layer, 0, :tokens])
            self.record.counts["wrong"] += not (right and np.array_equal(v, expected[layer, 1, :tokens]))
        self.record.counts["hit" if stream.complete else "miss"] += 1

    def _put(self) -> Steps:
        tokens, kv = tokens_of(self.number, PUT_CHUNKS), kv_of(self.number, PUT_CHUNKS)
        done = yield "put", lambda: self.side.cache.put(tokens, kv, quality="raw", deadline=self.deadline_s)
        self.record.counts["stored"] += done.stored

    def _writer(self) -> Steps:
        tokens, kv = tokens_of(self.number + 1, WRITER_CHUNKS), kv_of(self.number + 1, WRITER_CHUNKS)
        writer = self.side.cache.writer(tokens, quality="raw", deadline=self.deadline_s)
        yield "writer", getattr(writer, self.side.enter)
        for layer in range(LAYOUT.num_layers):
            yield "writer", lambda layer=layer: writer.write(layer, kv[layer, 0], kv[layer, 1])  # type: ignore[misc]
        yield "writer", lambda: getattr(writer, self.side.leave)(None, None, None)

    def _delete(self) -> Steps:
        """What the round before put."""
        gone = tokens_of(self.number - 2, PUT_CHUNKS)
        yield "delete", lambda: self.side.cache.delete(gone, deadline=self.deadline_s)

    def _stat(self) -> Steps:
        yield "stat", lambda: self.side.client.stat(deadline=self.deadline_s)

    @property
    def _held(self) -> list[int]:
        return tokens_of(HELD, HELD_CHUNKS)


def untouched(outs: list[Any]) -> bool:
    return all(bool((out == _MARK).all()) for out in outs)


def run(steps: Steps, ask: Ask) -> None:
    """All steps of a call of a synchronous client; a step that raises is the last."""
    step = next(steps, None)
    while step is not None:
        result, error, began_s = None, None, time.monotonic()
        try:
            result = step[1]()
        except BaseException as raised:  # noqa: BLE001 – noted, and judged by the driver
            error = raised
        step = _next(steps, ask, step[0], began_s, result, error)


async def run_async(steps: Steps, ask: Ask) -> None:
    """The same of an asynchronous client."""
    step = next(steps, None)
    while step is not None:
        result, error, began_s = None, None, time.monotonic()
        try:
            result = await step[1]()
        except BaseException as raised:  # noqa: BLE001 – noted, and judged by the driver
            error = raised
        step = _next(steps, ask, step[0], began_s, result, error)


def _next(
    steps: Steps, ask: Ask, name: str, began_s: float, result: Any, error: BaseException | None
) -> Step | None:  # fmt: skip
    is_end = isinstance(error, StopIteration | StopAsyncIteration)  # of a stream, which is no error
    ask.record.step(name, began_s, ask.deadline_s, None if is_end else error)
    try:
        if is_end and error is not None:
            return steps.throw(error)
        if error is not None:
            steps.close()
            return None
        return steps.send(result)
    except StopIteration:
        return None
