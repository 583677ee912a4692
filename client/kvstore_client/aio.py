"""The asynchronous client; `client.py` runs the same one for synchronous callers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry

from kvstore_client.background import QUEUE_BYTES_MAX
from kvstore_client.connection import Node, failures, understood
from kvstore_client.errors import InvalidArgument
from kvstore_client.namespace import AsyncNamespace
from kvstore_client.parts import AsyncPartsNamespace
from kvstore_client.results import NodeStat, TierStat
from kvstore_client.session import Session
from kvstore_client.target import parse_target
from kvstore_client.tls import TLS
from kvstore_client.transports.bulk_path import Transport, checked_transport
from kvstore_codec import DEFAULT_TENANT_KEY, Extras, KVLayout, Profile
from kvstore_proto.v1 import store_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self

DEADLINE_S = 2.0


class AsyncClient:
    """A client of one or more nodes, for the event loop that first uses it.

    `target`: "host:port", "unix:///path", or several of them (a list, or with commas). `deadline`: seconds that a
    call may take unless it says otherwise. `strict`: raise typed errors where a miss would be answered. `threads`:
    of the codec. `registry`: where the client's metrics go. `transport`: how objects travel: "auto", the best way that
    is found; or "grpc"; or, where the node has it, "tcp", "unix" or "shm" (this machine's shared memory).
    `background_bytes`: of KV that may wait to be put in the background, beyond which such puts are dropped. `tls`: for
    nodes that want it; without it nothing is encrypted, with it nothing but unix sockets is not. Connects when first
    used; raises InvalidArgument.
    """

    def __init__(
        self, target: str | Sequence[str], *, deadline: float = DEADLINE_S, strict: bool = False,
        threads: int | None = None, tenant_key: bytes = DEFAULT_TENANT_KEY, registry: CollectorRegistry = REGISTRY,
        transport: Transport = "auto", background_bytes: int = QUEUE_BYTES_MAX,
        tls: TLS | None = None,
    ) -> None:  # fmt: skip
        self._session = Session(
            parse_target(target), deadline_s=deadline, strict=strict, threads=threads, tenant_key=tenant_key,
            registry=registry, transport=checked_transport(transport), background_bytes=background_bytes,
            tls=tls,
        )  # fmt: skip

    def namespace(
        self, layout: KVLayout, *, part: int = 0, extras: Extras | None = None, tail: bool = False,
        profile: Profile | None = None, learn_statistics: bool = False,
    ) -> AsyncNamespace:  # fmt: skip
        """The KV of `layout`. `part`: which of its parts this caller holds. `extras`: LoRA, salt, multimodal content.
        `tail`: partial last chunks are stored and looked up as well.

        `profile`: what lossy puts are coded with (`kvstore calibrate` makes one, `Profile.load` reads it). It is stored
        beside the objects, so a reader needs none. `learn_statistics`: without a profile, this namespace learns a
        statistics profile from the first 1,024 tokens that it puts at a lossy quality, and codes later ones with it;
        keep the namespace rather than make one for each call. Raises InvalidArgument where the profile does not fit
        the layout.
        """
        return AsyncNamespace(
            self._session, layout, part=part, extras=extras, tail=tail, profile=profile,
            learn_statistics=learn_statistics,
        )  # fmt: skip

    def parts(
        self, layout: KVLayout, parts: Sequence[int] | None = None, *, extras: Extras | None = None
    ) -> AsyncPartsNamespace:
        """The KV of several parts of `layout` as one, of all unless given. They must be neighbours: the head groups
        from one to another, of the layer groups from one to another. Raises InvalidArgument."""
        chosen = range(layout.partition.parts) if parts is None else sorted(parts)
        if not chosen:
            raise InvalidArgument("name a part, or none for all of them")
        return AsyncPartsNamespace([self.namespace(layout, part=part, extras=extras) for part in chosen])

    async def stat(self, *, deadline: float | None = None) -> NodeStat:
        """The account of the first seed that answers. Raises the typed error where none does, strict or not."""
        limit = self._session.begin(deadline)

        async def ask(node: Node, timeout_s: float) -> pb.StatResponse:
            async with failures(node):
                answer: pb.StatResponse = understood(node, await node.stub.Stat(pb.StatRequest(), timeout=timeout_s))
            return answer

        with self._session.timed("stat"):
            node, stat = await self._session.attempt("stat", b"", limit, ask)
        return NodeStat(
            node=node.address,
            node_id=stat.node_id,
            version=stat.version,
            uptime_seconds=stat.uptime_seconds,
            objects=stat.objects,
            namespaces=stat.namespaces,
            leases=stat.leases,
            staged_objects=stat.staged_objects,
            staged_bytes=stat.staged_bytes,
            tiers=tuple(
                TierStat(
                    pb.Tier.Name(tier.tier).removeprefix("TIER_").lower(), tier.objects, tier.used_bytes,
                    tier.capacity_bytes,
                )
                for tier in stat.tiers
                if tier.tier in pb.Tier.values()
            ),
            counters=dict(stat.counters),
        )  # fmt: skip

    async def aclose(self) -> None:
        """Idempotent; calls under way end as if their node had gone away. What is put in the background has the
        client's deadline to be done, and is dropped then."""
        await self._session.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
