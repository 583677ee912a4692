"""What calls answer. A miss is an answer, not an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from kvstore_client.errors import InvalidArgument
from kvstore_codec import KVArray, Quality

if TYPE_CHECKING:
    from typing_extensions import Self

R = TypeVar("R")


@dataclass(frozen=True)
class ChunkHit:
    """One stored chunk of a prompt. `tier`: the fastest that holds it ("host", "disk" …)."""

    hash: bytes
    first_token: int
    tokens: int
    quality: Quality
    provenance: Quality
    stored_bytes: int
    tier: str

    @property
    def effective_quality(self) -> Quality:
        """The worse of the quality held and that of the prefix it was computed on."""
        return max(self.quality, self.provenance)


@dataclass(frozen=True)
class Lease:
    """The node's promise to keep the chunks of a Hit for `duration_ms` from its answer on. `node`: its address."""

    ids: tuple[bytes, ...]
    duration_ms: int
    node: str


@dataclass(frozen=True)
class Hit:
    """The longest stored prefix; all zero on a miss. `lease` is None where the node granted none. `latency_s`: what the
    node that answered takes for an answer, as known by now; the median of the last few."""

    tokens: int = 0
    chunks: tuple[ChunkHit, ...] = ()
    lease: Lease | None = None
    latency_s: float = field(default=0.0, compare=False)


class _KVAndTokens(NamedTuple):
    kv: KVArray
    n: int


class Restored(_KVAndTokens, Generic[R]):
    """What a get answers: `kv, n = cache.get(…)`. `refinement` is there where the get was asked to refine. `reason`:
    why it is less than all that was asked for, as kvstore_client_misses_total has it, or where the planner left
    something to the engine kvstore_client_planner_stops_total; "" where it is all."""

    reason: str
    _refinement: R | None

    def __new__(cls, kv: KVArray, n: int, refinement: R | None = None, reason: str = "") -> Self:
        made = super().__new__(cls, kv, n)
        made._refinement, made.reason = refinement, reason
        return made

    @property
    def refinement(self) -> R:
        """Raises InvalidArgument where the get was not asked to refine."""
        if self._refinement is None:
            raise InvalidArgument("a get has a refinement where it is asked for one: pass refine=True")
        return self._refinement


@dataclass(frozen=True)
class PrefetchResult:
    """Chunks that the node has in memory, and those that it looks for now: 0 also where it follows as many hints as it
    does at a time, or could not be asked."""

    held: int = 0
    under_way: int = 0


@dataclass(frozen=True)
class PutResult:
    """What became of a put's chunks.

    `stored`, `have`, `rejected`: chunks newly stored, there already at least as good, not stored.
    `tokens`: length of the prefix that the node now holds. `bytes`: encoded bytes of the stored chunks.
    `durable`: every chunk is on disk, synced. `reasons`: one line for each distinct cause of a rejection.
    `dropped`: a background put that was given up unanswered: the queue was full, its turn came too late, or the client
    was closed. All its chunks count as rejected.
    """

    stored: int = 0
    have: int = 0
    rejected: int = 0
    tokens: int = 0
    bytes: int = 0
    durable: bool = False
    reasons: tuple[str, ...] = ()
    dropped: bool = False


@dataclass(frozen=True)
class DeleteResult:
    """Objects and bytes freed on all seeds. `reasons`: one line for each seed that could not be asked."""

    objects: int = 0
    bytes: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class TierStat:
    tier: str
    objects: int
    used_bytes: int
    capacity_bytes: int


@dataclass(frozen=True)
class NodeStat:
    """A node's own account. `counters` count since its start."""

    node: str
    node_id: str
    version: str
    uptime_seconds: float
    objects: int
    namespaces: int
    leases: int
    staged_objects: int
    staged_bytes: int
    tiers: tuple[TierStat, ...]
    counters: dict[str, int]
