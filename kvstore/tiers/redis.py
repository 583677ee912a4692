"""Objects in a Redis that several nodes share, one server or a Cluster.

Other nodes write and delete here, values expire, Redis evicts by its own `maxmemory` policy: what is here is not
known, it is asked (`find`). So reads never raise: whatever is not answered in time, is gone, foreign or damaged is a
miss, counted through `Events`. Writes raise, since their caller keeps account of what is safe. Every call blocks, for
a bounded time (redis_connection.py), and may be made from any thread.

One SET writes a value whole or not at all (redis_format.py); a reader sees the old or the new one. A value that is no
object of its key is deleted, if it is still there as it was seen: another node may be replacing it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import NamedTuple, NoReturn, Protocol

import kvstore_codec as codec
from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.base import Bytes, StoredObject
from kvstore.tiers.redis_connection import Credentials
from kvstore.tiers.redis_format import (
    ENVELOPE_BYTES,
    Envelope,
    NewerVersion,
    NotOurs,
    namespace_pattern,
    seal,
    unseal,
    value_key,
    wrap,
)
from kvstore.tiers.redis_server import Command, Failure, FailureKind, RedisServer, Replies
from kvstore.tiers.redis_servers import Answer, Job, RedisServers
from kvstore.tiers.redis_url import RedisUrl
from kvstore_client.circuit import State

OBJECT_BYTES_MAX = 8 << 20  # one value is one reply: it is held in memory whole, and others wait behind it
READ_BYTES_MAX = 32 << 20  # of one `read_many`
_FIND_FIRST = 32
_FIND_MAX = 512
_SCAN_COUNT = 1000

# Cuts a value where it is, if it is still the one whose envelope we saw.
_TRUNCATE = """
if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then return 0 end
local kept = redis.call('GETRANGE', KEYS[1], #ARGV[1], #ARGV[1] + ARGV[3] - 1)
redis.call('SET', KEYS[1], ARGV[2] .. kept, 'KEEPTTL')
return 1
"""


# Deletes a value that starts so and is so long (-1: that is no string).
_DROP = """
local type = redis.call('TYPE', KEYS[1]).ok
local seen
if ARGV[2] == '-1' then
  seen = type ~= 'string'
else
  seen = type == 'string' and redis.call('STRLEN', KEYS[1]) == tonumber(ARGV[2])
    and redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) == ARGV[1]
end
return seen and redis.call('UNLINK', KEYS[1]) or 0
"""


class Events(Protocol):
    """What a tier tells whoever counts."""

    def failed(self, operation: str, kind: FailureKind, problem: str) -> None:
        """An operation got no answer for an object; `problem` is one line for people, without secrets."""

    def damaged(self, reason: str) -> None:
        """A value under one of our keys was no object: foreign, checksum, truncated, version, header or type."""

    def circuit(self, server: str, state: State) -> None:
        """A server is not asked for a while ("open"), or answers again ("closed"). To be counted: how things are now
        is in `RedisTier.states`, since threads may be late to tell."""


class _Value(NamedTuple):
    """The start of a value; `data` is what follows its envelope."""

    envelope: Envelope
    data: memoryview


class _Damaged(NamedTuple):
    """A value that is no object, as it was seen: its start and its length (-1: no string)."""

    key: ObjectKey
    head: bytes
    value_bytes: int


class RedisTier:
    """`ttl_s` 0: values do not expire. `read_only`: nothing is changed in Redis, neither by `put`, which raises, nor
    by what reads do: they refresh no time to live and delete nothing damaged. Opening it asks nothing."""

    name = "redis"

    def __init__(
        self, urls: Sequence[RedisUrl], credentials: Credentials, events: Events, *, cluster: bool = False,
        prefix: str = "kvstore", ttl_s: int = 0, timeout_s: float = 0.25, read_only: bool = False,
        clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None,
    ) -> None:  # fmt: skip
        self._events, self._prefix, self._ttl_s, self._read_only = events, prefix, ttl_s, read_only
        self._servers = RedisServers(
            urls, credentials, cluster=cluster, timeout_s=timeout_s, clock=clock,
            rng=random.Random() if rng is None else rng, on_circuit=events.circuit,
        )  # fmt: skip
        self._used_bytes = self._capacity_bytes = self._objects = 0

    @property
    def used_bytes(self) -> int:
        """Memory that Redis uses, for whatever, when `probe` last asked."""
        return self._used_bytes

    @property
    def capacity_bytes(self) -> int:
        """Redis' maxmemory when `probe` last asked; 0: no limit, or not known."""
        return self._capacity_bytes

    @property
    def objects(self) -> int:
        """Keys in the database, others' too, when `probe` last asked."""
        return self._objects

    @property
    def state(self) -> State:
        """That of the server that is best off; "open": a call would ask nobody."""
        states = set(self.states.values())
        return next(state for state in ("closed", "half-open", "open") if state in states)

    @property
    def states(self) -> dict[str, State]:
        """By server."""
        return {server.address: server.circuit.state for server in self._servers.servers}

    def cost_bytes(self, length: int) -> int:
        return ENVELOPE_BYTES + length

    def put(self, key: ObjectKey, parent: bytes, data: Bytes) -> None:
        """Stores or replaces. Raises TierFull for an object above OBJECT_BYTES_MAX and where Redis is at its maxmemory
        and evicts nothing, TierFailed where it does not answer: then it may have been stored or not."""
        if len(data) > OBJECT_BYTES_MAX:
            raise TierFull("redis tier takes no object so large", needed=len(data), free=OBJECT_BYTES_MAX)
        expiry = ("EX", self._ttl_s) if self._ttl_s else ()
        name = self._name(key)
        self._change("put", [Job(name, (("SET", name, wrap(key, parent, data), *expiry),))])

    def read(self, key: ObjectKey, length: int) -> memoryview | None:
        """The first `length` bytes of the object, or None."""
        return self.read_many([(key, length)])[0]

    def read_many(self, wanted: Sequence[tuple[ObjectKey, int]]) -> list[memoryview | None]:
        """The first so many bytes of each object, or None, in one round trip. All together at most READ_BYTES_MAX."""
        assert sum(length for _, length in wanted) <= READ_BYTES_MAX, "callers read in batches"
        touch = self._ttl_s and not self._read_only
        jobs = []
        for key, length in wanted:
            job = self._head_job(key, ENVELOPE_BYTES + length)
            jobs.append(Job(job.key, (*job.commands, ("EXPIRE", job.key, self._ttl_s))) if touch else job)
        found: list[memoryview | None] = []
        with self._servers.limits.call(), self._dropping() as damaged:
            for (key, length), answer in zip(wanted, self._servers.run(jobs), strict=True):
                value = self._value("read", key, answer, damaged)
                found.append(None if value is None or value.envelope.length < length else value.data)
        return found

    def find(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> list[StoredObject]:
        """The longest stored prefix of a chain, in windows that double: a miss costs one short round trip."""
        found: list[StoredObject] = []
        window = _FIND_FIRST
        with self._servers.limits.call():
            while len(found) < len(hashes):
                chunks = hashes[len(found) : len(found) + window]
                stored = self.describe([ObjectKey(namespace_id, chunk, part) for chunk in chunks])
                held = list(takewhile(lambda each: each is not None, stored))
                found += [each for each in held if each is not None]
                if len(held) < len(stored):
                    break
                window = min(2 * window, _FIND_MAX)
        return found

    def describe(self, keys: Sequence[ObjectKey]) -> list[StoredObject | None]:
        """What is stored under each key, without its bytes, in one round trip."""
        jobs = [self._head_job(key, ENVELOPE_BYTES + codec.HEADER_BYTES) for key in keys]
        found: list[StoredObject | None] = []
        with self._servers.limits.call(), self._dropping() as damaged:
            for key, answer in zip(keys, self._servers.run(jobs), strict=True):
                value = self._value("find", key, answer, damaged)
                found.append(None if value is None else self._described(key, value, damaged))
        return found

    def truncate(self, key: ObjectKey, length: int) -> bool:
        """Keeps the first `length` bytes of an object and its time to live; whether it was there.

        Raises TierFull where Redis, at its maxmemory, runs no script that writes, and TierFailed."""
        name = self._name(key)
        with self._servers.limits.call(), self._dropping() as damaged:
            self._refuse_if_read_only()
            (answer,) = self._servers.run([self._head_job(key, ENVELOPE_BYTES)])
            if isinstance(answer, Failure) and answer.kind != "type":
                self._raise("truncate", answer)
            value = self._value("truncate", key, answer, damaged)
            if value is None or isinstance(answer, Failure) or value.envelope.length < length:
                return False
            cut = seal(key, Envelope(length, value.envelope.parent))
            command: Command = ("EVAL", _TRUNCATE, 1, name, answer[0], cut, length)
            ((replaced,),) = self._change("truncate", [Job(name, (command,))])
            return bool(replaced)

    def delete(self, key: ObjectKey) -> bool:
        """Whether it was there. Raises TierFailed."""
        return self.delete_many([key]) == 1

    def delete_many(self, keys: Sequence[ObjectKey]) -> int:
        """How many were there. Raises TierFailed where a server does not answer; the other servers' are gone."""
        jobs = [Job(name, (("UNLINK", name),)) for name in map(self._name, keys)]
        deleted: int = sum(replies[0] for replies in self._change("delete", jobs))
        return deleted

    def purge(self, namespace_id: bytes) -> int:
        """Deletes a namespace on every server; how many objects went. It takes as many calls as there are keys in
        Redis, by the thousand. Raises TierFailed where a server does not answer to the end."""
        for answer in self._servers.ask_each([("PING",)]).values():  # and so every master of a Cluster is known
            if isinstance(answer, Failure):
                self._raise("purge", answer)
        return sum(self._purge_server(server, namespace_id) for server in self._servers.servers)

    def scan(self) -> Iterator[StoredObject]:
        """Nothing: what is here belongs to no single node and is not kept in its index."""
        return iter(())

    def probe(self) -> bool:
        """Asks every server how full it is; whether all answered. Called every few seconds, it also finds out that a
        server is back before a client needs it."""
        used = capacity = objects = 0
        answers = self._servers.ask_each([("INFO", "memory"), ("DBSIZE",)])
        for answer in answers.values():
            if isinstance(answer, Failure):
                self._events.failed("probe", answer.kind, answer.problem)
                continue
            memory = dict(line.split(":", 1) for line in answer[0].decode().splitlines() if ":" in line)
            used += int(memory.get("used_memory", 0))
            capacity += int(memory.get("maxmemory", 0))
            objects += answer[1]
        self._used_bytes, self._capacity_bytes, self._objects = used, capacity, objects
        return not any(isinstance(answer, Failure) for answer in answers.values())

    def close(self) -> None:
        self._servers.close()

    def _name(self, key: ObjectKey) -> bytes:
        return value_key(self._prefix, key)

    def _head_job(self, key: ObjectKey, head_bytes: int) -> Job:
        """The first bytes of a value, and how long it is."""
        name = self._name(key)
        return Job(name, (("GETRANGE", name, 0, head_bytes - 1), ("STRLEN", name)))

    def _value(self, operation: str, key: ObjectKey, answer: Answer, damaged: list[_Damaged]) -> _Value | None:
        """What the commands of `_head_job` found; None, and counted, where it is no object."""
        if isinstance(answer, Failure):
            if answer.kind == "type":
                self._events.damaged("type")
                damaged.append(_Damaged(key, b"", -1))
            else:
                self._events.failed(operation, answer.kind, answer.problem)
            return None
        value, value_bytes = answer[:2]
        if not value or not value_bytes:
            return None
        try:
            return _Value(unseal(key, value, value_bytes), memoryview(value)[ENVELOPE_BYTES:])
        except NotOurs as error:
            self._events.damaged(error.reason)
            if not isinstance(error, NewerVersion):
                damaged.append(_Damaged(key, value, value_bytes))
            return None

    def _described(self, key: ObjectKey, value: _Value, damaged: list[_Damaged]) -> StoredObject | None:
        length, head = value.envelope.length, bytes(value.data)
        try:
            header = codec.parse_header(head)
            quality = header.quality_at(length)
            ours = ObjectKey.of(header) == key
        except codec.UnsupportedObject:  # of a later version: a node that was upgraded reads it
            self._events.damaged("version")
            return None
        except codec.DamagedObject:
            ours = False
        if not ours:
            self._events.damaged("header")
            damaged.append(_Damaged(key, seal(key, value.envelope) + head, ENVELOPE_BYTES + length))
            return None
        return StoredObject(
            key, value.envelope.parent, header.first_position, header.tokens, quality, header.provenance,
            tuple(held for held in header.layer_bytes if held <= length), length,
        )  # fmt: skip

    @contextmanager
    def _dropping(self) -> Iterator[list[_Damaged]]:
        """Deletes the values that the block lists, in one round trip."""
        damaged: list[_Damaged] = []
        yield damaged
        if damaged and not self._read_only:
            jobs = []
            for key, head, value_bytes in damaged:
                name = self._name(key)
                jobs.append(Job(name, (("EVAL", _DROP, 1, name, head, value_bytes),)))
            for answer in self._servers.run(jobs):
                if isinstance(answer, Failure):
                    self._events.failed("delete", answer.kind, answer.problem)

    def _change(self, operation: str, jobs: Sequence[Job]) -> list[Replies]:
        """The replies; the first failure is raised once everything was asked."""
        self._refuse_if_read_only()
        answers = self._servers.run(jobs)
        return [self._raise(operation, answer) if isinstance(answer, Failure) else answer for answer in answers]

    def _refuse_if_read_only(self) -> None:
        if self._read_only:
            raise TierFailed('redis tier is only read: set redis_write = "behind" or "through"')

    def _raise(self, operation: str, failure: Failure) -> NoReturn:
        self._events.failed(operation, failure.kind, failure.problem)
        if failure.kind == "full":
            raise TierFull("redis is at its maxmemory and its policy evicts nothing", problem=failure.problem)
        raise TierFailed(f"redis tier cannot {operation}", kind=failure.kind, problem=failure.problem)

    def _purge_server(self, server: RedisServer, namespace_id: bytes) -> int:
        match = namespace_pattern(self._prefix, namespace_id)
        purged: int = 0
        cursor = b"0"
        while True:
            answer = self._servers.ask(server, [("SCAN", cursor, "MATCH", match, "COUNT", _SCAN_COUNT)])
            if isinstance(answer, Failure):
                self._raise("purge", answer)
            cursor, names = answer[0]
            jobs = [Job(name, (("UNLINK", name),)) for name in names]
            purged += sum(replies[0] for replies in self._change("purge", jobs))
            if cursor == b"0":
                return purged
