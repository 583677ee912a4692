"""The node's answers as protocol messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.engine import node as engine
from kvstore_proto.v1 import store_pb2 as pb

_TIERS = {
    "gpu": pb.TIER_GPU, "host": pb.TIER_HOST, "disk": pb.TIER_DISK, "redis": pb.TIER_REDIS,
    "upstream": pb.TIER_UPSTREAM,
}  # fmt: skip
_VERDICTS = {"send": pb.VERDICT_SEND, "have": pb.VERDICT_HAVE, "refused": pb.VERDICT_REFUSED}
_OUTCOMES = {"stored": pb.OUTCOME_STORED, "have": pb.OUTCOME_HAVE, "rejected": pb.OUTCOME_REJECTED}


def lookup_response(found: engine.LookupResult) -> pb.LookupResponse:
    return pb.LookupResponse(
        tokens=found.tokens,
        quality=found.qualities,
        provenance=found.provenances,
        stored_bytes=found.stored_bytes,
        tier=[_TIERS[tier] for tier in found.tiers],
        lease_id=found.lease_id,
        lease_ms=found.lease_ms,
    )


def verdicts(given: Iterable[engine.Verdict]) -> pb.PutResponse:
    return pb.PutResponse(verdicts=pb.PutVerdicts(verdicts=[_VERDICTS[verdict] for verdict in given]))


def results(given: Iterable[engine.Result]) -> pb.PutResponse:
    return pb.PutResponse(
        results=pb.PutResults(
            results=[
                pb.ObjectResult(
                    outcome=_OUTCOMES[result.outcome],
                    reason=" ".join(result.reason.split()),
                    durable=result.durable,
                )
                for result in given
            ]
        )
    )


def list_response(entries: Sequence[engine.ObjectEntry], next_token: str) -> pb.ListResponse:
    return pb.ListResponse(
        objects=[
            pb.ObjectEntry(
                namespace_id=entry.key.namespace_id,
                chunk_hash=entry.key.chunk_hash,
                part=entry.key.part,
                parent_hash=entry.parent,
                tokens=entry.tokens,
                first_position=entry.first_position,
                quality=entry.quality,
                provenance=entry.provenance,
                stored_bytes=entry.length,
                tiers=[_TIERS[tier] for tier in entry.tiers],
                idle_seconds=entry.idle_seconds,
                reads=entry.reads,
                leased=entry.leased,
                pinned=entry.pinned,
                model=entry.model,
                revision=entry.revision,
            )
            for entry in entries
        ],
        next_page_token=next_token,
    )


def verify_response(progress: engine.VerifyProgress) -> pb.VerifyResponse:
    return pb.VerifyResponse(
        checked=progress.checked,
        total=progress.total,
        damaged_hash=progress.damaged_hash or b"",
        problem=progress.problem or "",
    )


def stat_response(stat: engine.NodeStat) -> pb.StatResponse:
    return pb.StatResponse(
        version=stat.version,
        node_id=stat.node_id,
        uptime_seconds=stat.uptime_seconds,
        objects=stat.objects,
        namespaces=stat.namespaces,
        leases=stat.leases,
        staged_objects=stat.staged_objects,
        staged_bytes=stat.staged_bytes,
        pinned_bytes=stat.pinned_bytes,
        tiers=[
            pb.TierStat(
                tier=_TIERS[tier.tier],
                objects=tier.objects,
                used_bytes=tier.used_bytes,
                capacity_bytes=tier.capacity_bytes,
            )
            for tier in stat.tiers
        ],
        counters=stat.counters,
        upstreams=[pb.UpstreamStat(address=each.address, state=each.state) for each in stat.upstreams],
        unix_seconds=stat.unix_seconds,
    )
