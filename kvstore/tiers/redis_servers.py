"""The servers behind a redis_url, one or the masters of a Cluster, and which of them a key is on.

A call is a set of jobs, each the commands of one key. They are sent to every server concerned before the first reply
is read, so a call takes as long as the slowest server. What one server fails at does not concern the jobs of others:
with one master of three down, two thirds of the objects are still there. That, and a circuit for each server, is why
the routing is here and not `redis.RedisCluster`, which gives up a whole pipeline for one server and tries again on its
own. From `redis` come connections, protocol and the hash of keys to slots.

The map of slots is asked for when it is needed first, and again after a reply or a failure that speaks against it. A
job that is redirected (MOVED, ASK) follows once, within the same call.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from redis.connection import AbstractConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError, ResponseError

from kvstore.tiers.redis_connection import CallLimits, Credentials, open_pool
from kvstore.tiers.redis_server import Command, Failure, RedisServer, Replies, failure_of
from kvstore.tiers.redis_url import RedisUrl
from kvstore_client.circuit import Circuit, State


class Job(NamedTuple):
    """Commands for the server that `key` is on. All may be repeated without harm."""

    key: bytes
    commands: tuple[Command, ...]


Answer = Replies | Failure
_NO_OWNER = Failure("cluster", "no server of the Cluster has the key's slot")


class RedisServers:
    """Any thread may call. `urls`: one server, or nodes of a Cluster to ask first."""

    def __init__(
        self, urls: Sequence[RedisUrl], credentials: Credentials, *, cluster: bool, timeout_s: float,
        clock: Callable[[], float], rng: random.Random, on_circuit: Callable[[str, State], None],
    ) -> None:  # fmt: skip
        self.limits = CallLimits(timeout_s)
        self._credentials, self._cluster = credentials, cluster
        self._clock, self._rng, self._on_circuit = clock, rng, on_circuit
        self._lock = threading.Lock()  # of the two that follow
        self._servers: dict[str, RedisServer] = {}
        self._owners: list[RedisServer | None] = []  # by slot; empty before the first map of a Cluster
        self._learning = threading.Lock()
        self._stale = cluster
        self._unowned = _NO_OWNER
        self._template = urls[0]
        self._first = [self._server(url) for url in urls]

    @property
    def servers(self) -> list[RedisServer]:
        """The masters; before the map of a Cluster is known, the nodes to ask first."""
        masters = dict.fromkeys(owner for owner in self._owners if owner is not None)
        return list(masters) or self._first

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """An answer a job, in their order. A reply that is an error comes as a Failure."""
        with self.limits.call():
            self._learn_if_stale()
            owners = [self._owner(job.key) for job in jobs]
            answers = self._ask(jobs, owners)
            redirected = [number for number, answer in enumerate(answers) if _redirect(answer) is not None]
            if redirected and self._cluster:
                self._follow(jobs, answers, redirected)
            plain = [self._plain(owner, answer) for owner, answer in zip(owners, answers, strict=True)]
            if any(isinstance(answer, Failure) and answer.kind == "cluster" for answer in plain):
                self._stale = self._cluster
            return plain

    def ask_each(self, commands: Sequence[Command]) -> dict[RedisServer, Answer]:
        """The same commands to every master; where those are not known, the reason, for each node to ask first."""
        with self.limits.call():
            self._learn_if_stale()
            if self._cluster and not self._owners:
                return dict.fromkeys(self._first, self._unowned)
            servers = self.servers
            jobs = [Job(b"", tuple(commands))] * len(servers)
            answers = self._ask(jobs, servers)
            return {server: self._plain(server, answer) for server, answer in zip(servers, answers, strict=True)}

    def ask(self, server: RedisServer, commands: Sequence[Command]) -> Answer:
        """Commands to one of `servers`."""
        with self.limits.call():
            return self._plain(server, server.ask(commands))

    def close(self) -> None:
        for server in list(self._servers.values()):
            server.close()

    def _ask(self, jobs: Sequence[Job], owners: Sequence[RedisServer | None]) -> list[Answer]:
        answers: list[Answer] = [self._unowned] * len(jobs)
        numbers: dict[RedisServer, list[int]] = {}
        for number, owner in enumerate(owners):
            if owner is not None:
                numbers.setdefault(owner, []).append(number)
        unread: dict[RedisServer, AbstractConnection] = {}
        try:
            for server, its in numbers.items():
                sent = server.send([command for number in its for command in jobs[number].commands])
                if isinstance(sent, Failure):
                    self._failed(its, sent, answers)
                else:
                    unread[server] = sent
            while unread:
                server, connection = unread.popitem()
                its = numbers[server]
                replies = server.receive(connection, sum(len(jobs[number].commands) for number in its))
                if isinstance(replies, Failure):
                    self._failed(its, replies, answers)
                    continue
                remaining = iter(replies)
                for number in its:
                    answers[number] = list(itertools.islice(remaining, len(jobs[number].commands)))
        finally:
            for server, connection in unread.items():
                server.abandon(connection)
        return answers

    def _failed(self, its: Iterable[int], failure: Failure, answers: list[Answer]) -> None:
        for number in its:
            answers[number] = failure
        if failure.kind != "open":
            self._stale = self._cluster  # a replica may have taken over

    def _follow(self, jobs: Sequence[Job], answers: list[Answer], redirected: Sequence[int]) -> None:
        """Asks once more where the replies said."""
        again, owners = [], []
        for number in redirected:
            target = _redirect(answers[number])
            assert target is not None, "only what was redirected is followed"
            commands = jobs[number].commands
            if isinstance(target, MovedError):
                self._stale = True
            else:
                commands = tuple(each for command in commands for each in (("ASKING",), command))
            again.append(Job(jobs[number].key, commands))
            owners.append(self._server_at(target.host, target.port))
        for number, job, answer in zip(redirected, again, self._ask(again, owners), strict=True):
            asked = len(job.commands) > len(jobs[number].commands)
            answers[number] = answer[1::2] if asked and not isinstance(answer, Failure) else answer

    def _plain(self, server: RedisServer | None, answer: Answer) -> Answer:
        """An error that the server replied, as a Failure."""
        if isinstance(answer, Failure):
            return answer
        error = next((reply for reply in answer if isinstance(reply, ResponseError)), None)
        if error is None:
            return answer
        if isinstance(error, AskError):
            fix = "" if self._cluster else ": this is a Redis Cluster, set redis_cluster = true"
            return Failure("cluster", f"redirected to {error.node_addr}{fix}")
        return failure_of("" if server is None else server.address, error)

    def _owner(self, key: bytes) -> RedisServer | None:
        if not self._cluster:
            return self._first[0]
        owners = self._owners
        return owners[key_slot(key)] if owners else None

    def _learn_if_stale(self) -> None:
        """Asks for the map of slots: the masters that answer first, then the nodes of redis_url."""
        if not self._stale:
            return
        # Whoever is second uses the map there is, if there is one.
        if not self._learning.acquire(timeout=0 if self._owners else self.limits.left_s()):
            return
        try:
            known = sorted(self.servers, key=lambda server: server.circuit.state != "closed")
            for server in dict.fromkeys((*known, *self._first)) if self._stale else ():
                answer = self._plain(server, server.ask([("CLUSTER", "SLOTS")]))
                if not isinstance(answer, Failure):
                    self._stale, self._unowned = False, _NO_OWNER
                    self._use_map(server, answer[0])
                    return
                if not self._owners:
                    self._unowned = answer
        finally:
            self._learning.release()

    def _use_map(self, asked: RedisServer, ranges: Replies) -> None:
        owners: list[RedisServer | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for start, end, (host, port, *_), *_ in ranges:
            name = (host or b"").decode()
            # A node that does not know its own address says nothing: it is the one that was asked.
            server = self._server_at(name or asked.address.rpartition(":")[0].strip("[]"), port)
            owners[start : end + 1] = [server] * (end + 1 - start)
        self._owners = owners
        in_use = {*self._first, *(owner for owner in owners if owner is not None)}
        with self._lock:
            gone = [server for server in self._servers.values() if server not in in_use]
            self._servers = {address: server for address, server in self._servers.items() if server in in_use}
        for server in gone:
            server.close()

    def _server_at(self, host: str, port: int) -> RedisServer:
        return self._server(replace(self._template, host=host, port=port))

    def _server(self, url: RedisUrl) -> RedisServer:
        with self._lock:
            if url.address not in self._servers:
                pool = open_pool(url, self._credentials, self.limits)
                circuit = Circuit(self._clock, self._rng)
                self._servers[url.address] = RedisServer(url.address, pool, circuit, self._on_circuit)
            return self._servers[url.address]


def _redirect(answer: Answer) -> AskError | None:
    """The redirection among the replies to a job, if there is one; MOVED is an AskError, too."""
    if isinstance(answer, Failure):
        return None
    return next((reply for reply in answer if isinstance(reply, AskError)), None)
