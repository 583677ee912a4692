"""Which profile a namespace's puts are coded with, and where its gets have theirs from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import kvstore_codec as codec
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import InvalidArgument, KvClientError, ProfileDamaged
from kvstore_client.learning import Learner
from kvstore_client.profiles import (
    PROFILE_ID_BYTES,
    PROFILE_LAYOUT,
    chunks_of,
    profile_refs,
    require_profiles,
    require_usable,
)  # fmt: skip
from kvstore_client.putting import result_of
from kvstore_client.results import PutResult
from kvstore_client.session import Session
from kvstore_codec import KVArray, KVLayout, Profile


class NamespaceProfiles:
    def __init__(self, session: Session, layout: KVLayout, profile: Profile | None, learn_statistics: bool) -> None:
        """Raises InvalidArgument for a profile that does not fit `layout`, or a layout that no profile fits."""
        if profile is not None and learn_statistics:
            raise InvalidArgument("a namespace has a profile or learns one: pass profile= or learn_statistics=True")
        if profile is not None:
            require_usable(profile, layout)
        if learn_statistics:
            require_profiles(layout)
        self._session, self._layout = session, layout
        self._own = profile
        self._learner = Learner(layout) if learn_statistics else None
        self._recent: Profile | None = None

    @property
    def are_used(self) -> bool:
        """Whether lossy puts are coded with a profile, now or once one is learned."""
        return self._own is not None or self._learner is not None

    async def for_put(self, node: Node, *, durable: bool, deadline: Deadline) -> tuple[Profile | None, bool]:
        """(what lossy objects are coded with, whether it is on disk): None before anything is learned. The profile is
        stored on `node` when this returns.

        Raises the typed error where it cannot be; a learned one is done without instead, unless the client is strict.
        """
        if self._own is None:
            return None, True
        try:
            on_disk = await self._session.profiles.ensure(node, self._own, durable=durable, deadline=deadline)
        except KvClientError as error:
            if self._learner is None:
                raise
            self._session.forgive("put", error)
            return None, True
        return self._own, on_disk

    async def of_object(self, node: Node, profile_id: bytes, deadline: Deadline) -> Profile:
        """The profile that an object from `node` names.

        Raises ProfileMissing, ProfileDamaged (also where it does not fit), the typed error of a failed call."""
        for profile in (self._own, self._recent):
            if profile is not None and profile.profile_id == profile_id:
                self._session.profiles.use(node, profile)
                return profile
        others = [other for other in self._nodes(profile_id) if other.address != node.address]
        profile = await self._session.profiles.get([node, *others], profile_id, deadline)
        self._recent = self._fitting(profile)
        return profile

    async def learn_from(self, chunks: Sequence[tuple[KVArray, int]]) -> None:
        """Chunks (kv, first position) of a lossy put. They are not used any more when this returns; what is learned
        of them is there some time later."""
        learner = self._learner
        if learner is None or learner.is_full or not chunks:
            return
        loop, executor = asyncio.get_running_loop(), self._session.executor
        if await loop.run_in_executor(executor, learner.see, chunks):
            loop.run_in_executor(executor, learner.learn).add_done_callback(self._learned)

    async def store(self, profile: Profile, *, durable: bool, deadline: Deadline) -> PutResult:
        """See AsyncNamespace.store_profile."""
        require_usable(profile, self._layout)
        try:
            _, stored = await self._session.attempt(
                "store_profile", self._placement_key(profile.profile_id), deadline,
                lambda node, timeout_s: self._session.profiles.store(
                    node, profile, durable=durable, deadline=Deadline(timeout_s)
                ),
            )  # fmt: skip
        except KvClientError as error:
            chunks = chunks_of(len(profile.to_bytes()))
            self._session.metrics.rejections.labels(error.code.value).inc(chunks)
            self._session.forgive("store_profile", error)
            return PutResult(rejected=chunks, reasons=(str(error),))
        self._session.count_rejected("store_profile", stored)
        return result_of(None, stored)

    async def load(self, profile_id: bytes, deadline: Deadline) -> Profile | None:
        """See AsyncNamespace.load_profile."""
        if not isinstance(profile_id, bytes) or len(profile_id) != PROFILE_ID_BYTES:
            raise InvalidArgument(f"a profile id is {PROFILE_ID_BYTES} bytes, profile.profile_id")
        try:
            profile = await self._session.profiles.get(list(self._nodes(profile_id)), profile_id, deadline)
            return self._fitting(profile)
        except KvClientError as error:
            self._session.metrics.failures.labels("load_profile", error.code.value).inc()
            self._session.forgive("load_profile", error)
            return None

    def _fitting(self, profile: Profile) -> Profile:
        try:
            require_usable(profile, self._layout)
        except InvalidArgument as error:
            raise ProfileDamaged(f"the profile is not one of this layout: {error}") from error
        return profile

    def _nodes(self, profile_id: bytes) -> Sequence[Node]:
        return list(self._session.connections.ranked(self._placement_key(profile_id)))

    def _placement_key(self, profile_id: bytes) -> bytes:
        """As of a prompt that begins with the profile's first chunk."""
        (first,) = profile_refs(profile_id, 1, self._session.tenant_key)
        return PROFILE_LAYOUT.namespace_id + first.hash

    def _learned(self, learning: asyncio.Future[Profile]) -> None:
        if learning.cancelled():
            return
        error = learning.exception()
        if error is None:
            self._own = learning.result()
            self._session.metrics.profiles.labels("learned").inc()
        elif isinstance(error, codec.CodecError):  # of values that teach nothing: objects do without
            self._session.metrics.failures.labels("learn", error.code.value).inc()
            self._session.warn("learn", error.code, str(error))
        else:
            raise error
