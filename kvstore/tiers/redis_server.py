"""One Redis server: pipelines to it, and the circuit breaker in front of it.

What goes wrong is a value, `Failure`, not an exception: the other servers' answers to the same call are of use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from redis import exceptions as errors
from redis.connection import AbstractConnection, BlockingConnectionPool

from kvstore_client.circuit import Circuit, State

log = logging.getLogger(__name__)

FailureKind = Literal[
    "timeout", "connection", "authentication", "loading", "cluster", "full", "type", "refused", "open"
]  # fmt: skip
Command: TypeAlias = tuple[Any, ...]
#: One a command; an error that the server answered is among them, not raised.
Replies: TypeAlias = list[Any]

_KINDS: tuple[tuple[type[errors.RedisError], FailureKind], ...] = (
    (errors.TimeoutError, "timeout"),
    (errors.AuthenticationError, "authentication"),
    (errors.BusyLoadingError, "loading"),
    (errors.OutOfMemoryError, "full"),
    (errors.ClusterDownError, "cluster"),
    (errors.TryAgainError, "cluster"),
    (errors.AskError, "cluster"),  # MOVED is one of these
    (errors.ResponseError, "refused"),
)


@dataclass(frozen=True)
class Failure:
    """Why there is no answer. "open": nothing was asked, since the circuit is open; "type": the key holds something
    other than a string. `problem` is for people."""

    kind: FailureKind
    problem: str


def failure_of(address: str, error: errors.RedisError) -> Failure:
    problem = " ".join(str(error).split())
    if problem.startswith("WRONGTYPE"):
        return Failure("type", f"{address}: {problem}")
    kind: FailureKind = next((kind for class_, kind in _KINDS if isinstance(error, class_)), "connection")
    return Failure(kind, f"{address}: {problem}")


class RedisServer:
    """`on_circuit(address, state)` is told when the circuit opens and when it closes again."""

    def __init__(
        self, address: str, pool: BlockingConnectionPool, circuit: Circuit, on_circuit: Callable[[str, State], None]
    ) -> None:
        self.address, self.circuit = address, circuit
        self._pool, self._on_circuit = pool, on_circuit

    def send(self, commands: Sequence[Command]) -> AbstractConnection | Failure:
        """Sends a pipeline. The connection that comes back is to be handed to `receive` or `abandon`."""
        if not self.circuit.allow():
            return Failure("open", f"{self.address}: not asked, it has been failing")
        try:
            connection: AbstractConnection = self._pool.get_connection()  # type: ignore[no-untyped-call]
        except errors.RedisError as error:
            return self._fail(error)
        try:
            connection.send_packed_command(connection.pack_commands(commands))  # type: ignore[no-untyped-call]
        except errors.RedisError as error:
            self.abandon(connection)
            return self._fail(error)
        except BaseException:
            self.abandon(connection)
            raise
        return connection

    def receive(self, connection: AbstractConnection, count: int) -> Replies | Failure:
        """The replies to a pipeline of `count` commands."""
        replies: Replies = []
        try:
            for _ in range(count):
                try:
                    replies.append(connection.read_response())
                except errors.ResponseError as reply:
                    replies.append(reply)
        except errors.RedisError as error:
            self.abandon(connection)
            return self._fail(error)
        except BaseException:
            self.abandon(connection)
            raise
        self._pool.release(connection)  # type: ignore[no-untyped-call]
        if self.circuit.succeed():
            log.info("Redis at %s answers again", self.address)
            self._on_circuit(self.address, "closed")
        return replies

    def ask(self, commands: Sequence[Command]) -> Replies | Failure:
        sent = self.send(commands)
        return sent if isinstance(sent, Failure) else self.receive(sent, len(commands))

    def abandon(self, connection: AbstractConnection) -> None:
        """Gives back a connection whose replies nobody reads."""
        connection.disconnect()  # type: ignore[no-untyped-call]
        self._pool.release(connection)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Closes what is idle; calls under way end on their own."""
        self._pool.disconnect(inuse_connections=False)

    def _fail(self, error: errors.RedisError) -> Failure:
        failure = failure_of(self.address, error)
        if self.circuit.fail():
            log.warning("Redis is not asked for a while: %s", failure.problem)
            self._on_circuit(self.address, "open")
        return failure
