"""What the planner answers: a choice for each stored chunk, when it will be there, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvstore_client.planner.choose import UTILITY
from kvstore_client.planner.estimates import Speeds
from kvstore_codec import Quality


@dataclass(frozen=True)
class PlannedChunk:
    """One stored chunk. `quality`: what to fetch it at, None to recompute it. `bytes`: to fetch, estimated from the
    object's size. `fetch_s`, `decode_s`, `recompute_s`: what each would take or takes; `ready_s`: when it is there, in
    seconds since the get began (of a recomputed one: the end of its prefill)."""

    first_token: int
    tokens: int
    quality: Quality | None
    bytes: int
    fetch_s: float
    decode_s: float
    recompute_s: float
    ready_s: float


@dataclass(frozen=True)
class Plan:
    """`ttft_s`: predicted seconds until all of the prompt's KV is there; `goal_s`: what was asked for;
    `recompute_s`: computing all of the prompt instead. `tokens`: of the prompt, of which `stored_tokens` are stored and
    `fetched_tokens` will be fetched. `probe`: the peer has not been measured, so that all of it rests on a guess; the
    first chunk of a get measures. `str()` is a table; `to_dict()` is made of what JSON has."""

    chunks: tuple[PlannedChunk, ...]
    ttft_s: float
    goal_s: float
    recompute_s: float
    tokens: int
    speeds: Speeds
    probe: bool
    reason: str

    @property
    def meets_goal(self) -> bool:
        return self.ttft_s <= self.goal_s

    @property
    def stored_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def fetched_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks if chunk.quality is not None)

    @property
    def fetched_bytes(self) -> int:
        return sum(chunk.bytes for chunk in self.chunks if chunk.quality is not None)

    @property
    def quality(self) -> Quality | None:
        """The worst that is fetched: the provenance of KV that is computed on top. None where nothing is."""
        return max((chunk.quality for chunk in self.chunks if chunk.quality is not None), default=None)

    @property
    def utility(self) -> float:
        """Mean over the stored tokens of the decades of KL that their quality is clear of; 5 for what is exact or
        recomputed."""
        if not self.chunks:
            return UTILITY[Quality.RAW]
        worth = [chunk.tokens * UTILITY[chunk.quality or Quality.RAW] for chunk in self.chunks]
        return sum(worth) / self.stored_tokens

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        for chunk, known in zip(plain["chunks"], self.chunks, strict=True):
            chunk["quality"] = known.quality.label if known.quality is not None else None
        plain["chunks"] = list(plain["chunks"])
        plain["speeds"]["decode"] = {quality.label: rate for quality, rate in self.speeds.decode.items()}
        derived = ("meets_goal", "stored_tokens", "fetched_tokens", "fetched_bytes")
        return plain | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        lines = [
            self.reason,
            f"{self.ttft_s:.3f} s of {self.goal_s:.3f} s; recomputing {self.recompute_s:.3f} s; link "
            f"{self.speeds.bytes_per_s / 1e6:.1f} MB/s, {1e3 * self.speeds.latency_s:.1f} ms",
            "tokens              do            MB   fetch s  decode s  recompute s   ready s",
        ]
        lines += [_line(run) for run in _runs(self.chunks)]
        return "\n".join(lines)


def _runs(chunks: tuple[PlannedChunk, ...]) -> list[list[PlannedChunk]]:
    """Neighbours of one quality together."""
    runs: list[list[PlannedChunk]] = []
    for chunk in chunks:
        if runs and runs[-1][0].quality is chunk.quality:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


def _line(run: list[PlannedChunk]) -> str:
    first, last = run[0].first_token, run[-1].first_token + run[-1].tokens
    label = run[0].quality.label if run[0].quality is not None else "recompute"
    sums = [sum(values) for values in zip(*((c.fetch_s, c.decode_s, c.recompute_s) for c in run), strict=True)]
    megabytes = sum(chunk.bytes for chunk in run) / 1e6
    return (
        f"{f'{first}–{last}':<18}  {label:<10}{megabytes:>6.2f}  {sums[0]:>8.3f}  {sums[1]:>8.3f}  {sums[2]:>11.3f}"
        f"  {run[-1].ready_s:>8.3f}"
    )
