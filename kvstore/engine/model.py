"""What goes into the node and comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvstore.index.entry import ObjectKey
from kvstore_codec import Quality

Verdict = Literal["send", "have", "refused"]
Outcome = Literal["stored", "have", "rejected"]


@dataclass(frozen=True)
class Offer:
    """An object that a writer would send. `parent`: hash of the chunk before it."""

    hash: bytes
    parent: bytes
    object_bytes: int
    quality: Quality


@dataclass(frozen=True)
class Result:
    """`reason`: one line, for rejected. `durable`: it is on disk, synced."""

    outcome: Outcome
    reason: str
    durable: bool


@dataclass(frozen=True)
class LookupResult:
    """The longest stored prefix, one value a chunk in each list (thousands of chunks as objects would cost more than
    finding them). `tiers`: the fastest that holds that much of it. `lease_id` is empty where no lease was taken."""

    tokens: Sequence[int] = ()
    qualities: Sequence[int] = ()
    provenances: Sequence[int] = ()
    stored_bytes: Sequence[int] = ()
    tiers: Sequence[str] = ()
    lease_id: bytes = b""
    lease_ms: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ObjectEntry:
    key: ObjectKey
    parent: bytes
    tokens: int
    first_position: int
    quality: Quality
    provenance: Quality
    length: int
    tiers: tuple[str, ...]
    idle_seconds: float
    reads: int
    leased: bool
    pinned: bool
    model: str
    revision: str


@dataclass(frozen=True)
class VerifyProgress:
    """After each object; `damaged_hash` is set where it was damaged (and has been dropped)."""

    checked: int
    total: int
    damaged_hash: bytes | None = None
    problem: str | None = None


@dataclass(frozen=True)
class TierStat:
    tier: str
    objects: int
    used_bytes: int
    capacity_bytes: int


@dataclass(frozen=True)
class UpstreamStat:
    """`state`: of the circuit, "closed" where the node is asked."""

    address: str
    state: str


@dataclass(frozen=True)
class NodeStat:
    version: str
    node_id: str
    uptime_seconds: float
    objects: int
    namespaces: int
    leases: int
    staged_objects: int
    staged_bytes: int
    pinned_bytes: int
    tiers: list[TierStat]
    counters: dict[str, int]
    upstreams: list[UpstreamStat]
    unix_seconds: float  # the machine's clock
