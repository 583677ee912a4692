"""The profiles that a client holds, and what it knows of where they are stored. Shared by its namespaces.

A large profile may take longer to travel than one call may take. So a transfer is a task of its own that every call
that needs it waits for, each until its own deadline: the call is a miss (or its chunks are rejected), the transfer goes
on, and a later call finds the profile there.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, TypeVar

from kvstore_client.connection import Node, timeout_s
from kvstore_client.deadline import Clock, Deadline
from kvstore_client.errors import (
    DeadlineExceeded,
    KvClientError,
    ProfileDamaged,
    ProfileMissing,
    RequestRefused,
    Unavailable,
)  # fmt: skip
from kvstore_client.metrics import ClientMetrics
from kvstore_client.profile_transfer import Placed, ProfileTransfer
from kvstore_client.putting import Stored
from kvstore_codec import Profile

#: Profiles held in memory; of larger ones the last used.
HELD_BYTES_MAX = 256 << 20
#: How long a node is believed to still have what it had. Asking again is a use of the profile as well, without which
#: it would be evicted before the objects that need it.
BELIEVED_S = 10.0
#: How long a profile that was found damaged is not loaded again.
DAMAGED_S = 10.0
#: What a transfer may take, however short the calls that wait for it.
TRANSFER_S = 60.0

R = TypeVar("R")


class ProfileShelf:
    def __init__(
        self, transfer: Callable[[], ProfileTransfer], metrics: ClientMetrics, clock: Clock = time.monotonic
    ) -> None:
        """`transfer`: asked for when needed, as it has threads."""
        self._transfer, self._metrics, self._clock = transfer, metrics, clock
        self._held: OrderedDict[bytes, Placed] = OrderedDict()
        # By node, profile and whether it was to be on disk: when the node had it, and whether it was there on disk.
        self._seen: dict[tuple[str, bytes, bool], tuple[float, bool]] = {}
        self._damaged: dict[bytes, tuple[float, ProfileDamaged]] = {}
        self._tasks: dict[Hashable, asyncio.Future[Any]] = {}

    async def get(self, nodes: Sequence[Node], profile_id: bytes, deadline: Deadline) -> Profile:
        """A profile that is held, or that one of `nodes` has; the first of them is asked first.

        Raises ProfileMissing, ProfileDamaged, DeadlineExceeded, the typed error of a failed call."""
        placed = self._held.get(profile_id)
        if placed is None:
            placed = await self._shared(
                ("load", profile_id), lambda limit: self._load(nodes, profile_id, limit), deadline, profile_id
            )
        self._hold(placed)
        return placed.profile

    def use(self, node: Node, profile: Profile) -> None:
        """Tells `node`, now and then, that a profile is in use, lest it be evicted; nobody waits for that."""
        profile_id = profile.profile_id
        if not self._is_believed(node, profile_id, durable=False):
            self._believe(node, profile_id, durable=False)
            self._started(("use", node.address, profile_id), lambda limit: self._ask(node, profile, limit))

    async def ensure(self, node: Node, profile: Profile, *, durable: bool, deadline: Deadline) -> bool:
        """Sees to it that `node` has the profile; whether it is on disk there, asked only where `durable`.

        Raises RequestRefused (the node does not take it), DeadlineExceeded, the typed error of a failed call."""
        if self._is_believed(node, profile.profile_id, durable=durable):
            return self._seen.get((node.address, profile.profile_id, True), (0.0, False))[1]
        stored = await self.store(node, profile, durable=durable, deadline=deadline)
        refused = next((chunk.reason for chunk in stored if chunk.outcome == "rejected"), None)
        if refused is not None:
            raise RequestRefused("the node does not store the profile", node=node.address, details=refused)
        return all(chunk.durable for chunk in stored)

    async def store(self, node: Node, profile: Profile, *, durable: bool, deadline: Deadline) -> list[Stored]:
        """Puts what `node` lacks of the profile; an answer for each chunk. Raises as `ensure`."""
        return await self._shared(
            ("store", node.address, profile.profile_id, durable),
            lambda limit: self._store(node, profile, durable, limit), deadline, profile.profile_id,
        )  # fmt: skip

    def doubt(self) -> None:
        """Something failed: a node may not be the one it was."""
        self._seen.clear()

    async def aclose(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._held.clear()

    async def _load(self, nodes: Sequence[Node], profile_id: bytes, deadline: Deadline) -> Placed:
        when, damaged = self._damaged.get(profile_id, (0.0, None))
        if damaged is not None and self._clock() - when < DAMAGED_S:
            raise damaged
        problem: KvClientError | None = None
        for left, node in zip(range(len(nodes), 0, -1), nodes, strict=True):
            try:
                limit = Deadline(timeout_s(deadline, left))
                placed = await self._transfer().load(node, profile_id, limit)
            except KvClientError as error:
                problem = problem or error
                continue
            if placed is not None:
                self._hold(placed)
                self._believe(node, profile_id, durable=False)
                return placed
        if isinstance(problem, ProfileDamaged):
            now = self._clock()
            self._damaged = {key: each for key, each in self._damaged.items() if now - each[0] < DAMAGED_S}
            self._damaged[profile_id] = (now, problem)
        if problem is not None:
            raise problem
        self._forget(profile_id)
        raise ProfileMissing(
            "the object was coded with a profile that is not stored (any more)", profile=profile_id.hex(),
            nodes=", ".join(node.address for node in nodes),
        )  # fmt: skip

    async def _store(self, node: Node, profile: Profile, durable: bool, deadline: Deadline) -> list[Stored]:
        placed = await self._placed(profile)
        stored = await self._transfer().store(node, placed, durable=durable, deadline=deadline)
        if all(chunk.outcome != "rejected" for chunk in stored):
            on_disk = all(chunk.durable for chunk in stored)
            self._believe(node, profile.profile_id, durable=durable, on_disk=on_disk)
        return stored

    async def _ask(self, node: Node, profile: Profile, deadline: Deadline) -> None:
        if not await self._transfer().holds(node, await self._placed(profile), timeout_s(deadline)):
            self._forget(profile.profile_id)

    async def _placed(self, profile: Profile) -> Placed:
        placed = self._held.get(profile.profile_id) or await self._transfer().placed(profile)
        self._hold(placed)
        return placed

    async def _shared(
        self, key: Hashable, work: Callable[[Deadline], Coroutine[Any, Any, R]], deadline: Deadline, profile_id: bytes
    ) -> R:
        """The outcome of `work`, which others may be waiting for as well. It goes on where this call's time is up."""
        task: asyncio.Future[R] = self._started(key, work, deadline.remaining())
        await asyncio.wait([task], timeout=deadline.remaining())
        if task.cancelled():
            raise Unavailable("the client was closed during the call")
        if not task.done():
            raise DeadlineExceeded(
                "the deadline passed while a profile travelled; it travels on", seconds=deadline.seconds,
                profile=profile_id.hex(),
            )  # fmt: skip
        return task.result()

    def _started(
        self, key: Hashable, work: Callable[[Deadline], Coroutine[Any, Any, R]], seconds: float = 0.0
    ) -> asyncio.Future[R]:
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.ensure_future(work(Deadline(max(TRANSFER_S, seconds))))
            self._tasks[key] = task
            task.add_done_callback(lambda ended: self._ended(key, ended))
        return task

    def _ended(self, key: Hashable, task: asyncio.Future[Any]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            error = task.exception()
            if isinstance(error, KvClientError):  # that it is the outcome of, whoever waits for it
                self._metrics.failures.labels("profile", error.code.value).inc()

    def _hold(self, placed: Placed) -> None:
        """The most recent one always stays."""
        self._held[placed.profile.profile_id] = placed
        self._held.move_to_end(placed.profile.profile_id)
        while len(self._held) > 1 and sum(each.size for each in self._held.values()) > HELD_BYTES_MAX:
            self._held.popitem(last=False)

    def _believe(self, node: Node, profile_id: bytes, *, durable: bool, on_disk: bool = False) -> None:
        now = self._clock()
        self._seen = {key: seen for key, seen in self._seen.items() if now - seen[0] < BELIEVED_S}
        self._seen[node.address, profile_id, durable] = (now, on_disk)

    def _is_believed(self, node: Node, profile_id: bytes, *, durable: bool) -> bool:
        seen = [self._seen.get((node.address, profile_id, asked)) for asked in {True, durable}]
        return any(each is not None and self._clock() - each[0] < BELIEVED_S for each in seen)

    def _forget(self, profile_id: bytes) -> None:
        self._seen = {key: seen for key, seen in self._seen.items() if key[1] != profile_id}
