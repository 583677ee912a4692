"""The controller: what to fetch next, thought over again whenever a chunk has come.

It does no I/O. Its owner asks `step` for a request, tells it what `arrived`, and stops where it says so; slack that was
gained or lost is in the clock, so the next choice has it. When there is no step more it asks what to `refine`.
`bench/planner.py` drives the same class over made links.

Most of the time the coarsest quality comes first, all of it: whatever the link does then costs quality and no deadline.

Never slower than recomputing, by more than SLOWER_MAX: while chunk i is on its way, recomputing from i on is always
there to fall back on, so a chunk is given up (`give_up_at`) when waiting longer would cost that. What was spent before
the controller is asked (`spent_s`: connecting, the lookup) is gone whatever it says, and no part of that.

What a chunk that does not come tells of the link is decided when its end is known: given up while its bytes still came
it is a measurement, given up in silence a doubt, broken off by a fault nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from kvstore_client.planner.choose import Choice, Chunk, State, choose, ready_times
from kvstore_client.planner.estimates import DecodeEstimates, PeerEstimates, Piece, Speeds, SpeedsAt, careful, expected
from kvstore_client.planner.plan import Plan, PlannedChunk
from kvstore_client.planner.refine import Refine, refinement
from kvstore_codec import Quality

#: Share of the time of recomputing everything that may be lost to a link that turns out too slow.
SLOWER_MAX = 0.04
#: How many times its predicted duration a chunk is waited for, where the link is known and there is as much to win.
_WAIT_FACTOR = 1.2
#: Left of the budget: sizes are estimates, and the last chunk's surprise has nowhere to go.
_MARGIN = 0.03
#: How many times slower the link may become, at the worst moment, without costing the deadline.
_DROP = 8.0
#: Of the time that a chunk was waited for: who was silent for longer at its end may be gone. Where bytes come evenly
#: but are only seen by the message, the last silence is shorter than the time before it.
_SILENT_SHARE = 0.5


class Stop(str, Enum):
    """Why a get that followed the planner left some of what is stored to the engine; the `reason` of metrics."""

    SLOW = "slow"  # not asked for: by what is measured, computing is sooner
    DOUBTED = "doubted"  # not asked for: a get before it gave the peer up a moment ago
    UNMEASURED = "unmeasured"  # not asked for: nothing is measured, and trying would take too long
    LATE = "late"  # given up on its way: it came too slowly
    SILENT = "silent"  # given up on its way: nothing came, or nothing more


@dataclass(frozen=True)
class Task:
    """A prompt of `tokens` tokens whose first ones are stored in `chunks`. `recompute_s[i]`: seconds to compute the
    prompt from chunk i on (the last: what is not stored). `ttft_s`: when all of it is wanted, from the get's begin."""

    chunks: Sequence[Chunk]
    recompute_s: Sequence[float]
    tokens: int
    ttft_s: float


@dataclass(frozen=True)
class Step:
    """Fetch the chunks [first, last) at no better than `quality`, in one stream."""

    first: int
    last: int
    quality: Quality


class Controller:
    """Of one get from one node. `now` is the estimates' clock, in seconds; the get begins when this is made, or began
    then and has spent `spent_s` on what it needed in any case. `stopped`: why it fetches no more."""

    def __init__(
        self, task: Task, peer: PeerEstimates, decode: DecodeEstimates, now: float, spent_s: float = 0.0
    ) -> None:
        self._task, self._peer, self._decode = task, peer, decode
        self.began, self._spent_s = now, spent_s
        self.stopped: Stop | None = None
        self._state = State()
        self._step: Step | None = None
        self._wait_s = 0.0  # for the chunk on its way, since the begin
        self._slow = math.inf  # bytes a second of a chunk that is late
        self._given_up = False
        self._supposed: list[Piece] = []  # what the link's estimate has of the chunk on its way
        self._held: list[Quality] = []  # of the chunks that are done
        self._coarsely = False  # the coarsest first: once begun so, all of it

    @property
    def _budget_s(self) -> float:
        return (1 - _MARGIN) * min(self._task.ttft_s, self._task.recompute_s[0])

    @property
    def done(self) -> int:
        """Chunks that have arrived."""
        return self._state.done

    @property
    def give_up_at(self) -> float:
        """Until when to wait for the chunk on its way, on the estimates' clock; then ask `late`."""
        return self.began + self._wait_s

    def step(self, now: float) -> Step | None:
        """The next request; None where the rest is to be recomputed, or there is no more."""
        self._state = replace(self._state, now=now - self.began, flowing=None)
        self._step = None if self._given_up or self.done == len(self._task.chunks) else self._next(now)
        if self._step is None and self.done < len(self._task.chunks) and self.stopped is None:
            self.stopped = self._why_not(now)
        return self._step

    def arrived(self, size_bytes: int, seconds: float, now: float, *, held_up: bool = False) -> bool:
        """A chunk has come, `seconds` after the one before it (or after the stream's first byte was due). Whether to go
        on with this step. `held_up`: it may have waited here, for the decoder."""
        assert self._step is not None, "chunks come in a step"
        self._settle(measured=True)
        self._peer.link.observe(size_bytes, seconds, now, at_least=held_up)
        self._slow = math.inf
        chunk, since = self._task.chunks[self.done], now - self.began
        quality = chunk.no_better_than(self._step.quality)
        decode_s = chunk.elements / self._decode.expected(now)[quality]
        self._state = State(
            self.done + 1, since, self._step.quality, max(since, self._state.decoder_free_s) + decode_s
        )  # fmt: skip
        self._held.append(quality)
        if self.done == self._step.last:
            return False
        following = self._next(now)
        return following is not None and following.quality is self._step.quality

    def late(self, size_bytes: int, seconds: float, now: float, silent_s: float = 0.0) -> bool:
        """The chunk on its way has not come by `give_up_at`; so many bytes of it have, in `seconds`, the last of them
        `silent_s` ago. Whether to wait for it longer, by what that tells of the link; if not, the rest is to be
        recomputed."""
        assert self._step is not None, "chunks come in a step"
        at_most = size_bytes or self._due_bytes()
        came_s = 0.0
        if seconds > 0:
            self._suppose(size_bytes, seconds, now)
            self._slow = min(self._slow, at_most / seconds)
            came_s = size_bytes / self._slow
        self._state = replace(self._state, now=now - self.began - came_s, flowing=self._step.quality)
        following = self._next(now)
        self._given_up = following is None or self.give_up_at <= now
        if self._given_up:
            self.stopped = self._ended(size_bytes, seconds, now, silent_s)
        return not self._given_up

    def overdue(self, size_bytes: int, seconds: float, now: float, silent_s: float = 0.0) -> None:
        """The call's own deadline passed while the chunk was on its way: that ends the get; the rest as of `late`."""
        self._suppose(size_bytes, seconds, now)
        self._ended(size_bytes, seconds, now, silent_s)

    def broken(self) -> None:
        """A fault ended the request with the chunk on its way: what came of it when says nothing of the link."""
        self._settle(measured=False)

    def refine(self, now: float) -> Refine | None:
        """What to refine when `step` has no more; None where nothing can be by the time that the engine has to begin
        with the rest."""
        if self._given_up or not self.done:
            return None
        self._state = replace(self._state, now=now - self.began)
        until_s = self._budget_s - self._task.recompute_s[self.done]
        return refinement(self._task.chunks, self._held, self._state, self._speeds(expected, now), until_s)

    def refined(
        self, index: int, quality: Quality, size_bytes: int, seconds: float, now: float, *, held_up: bool = False
    ) -> None:
        """What chunk `index` lacked to `quality` has come; the rest as of `arrived`."""
        self._peer.link.observe(size_bytes, seconds, now, at_least=held_up)
        since, chunk = now - self.began, self._task.chunks[index]
        self._held[index] = chunk.no_better_than(quality)
        decode_s = chunk.elements / self._decode.expected(now)[self._held[index]]
        self._state = replace(self._state, now=since, decoder_free_s=max(since, self._state.decoder_free_s) + decode_s)

    def plan(self, now: float) -> Plan:
        """The choice as it is now, explained."""
        choice = self._choose(now)
        return explained(self._task, choice, self._peer, self._decode, now, probe=not self._peer.link.known(now))

    def _due_bytes(self) -> int:
        """Of the chunk on its way."""
        assert self._step is not None, "chunks come in a step"
        chunk = self._task.chunks[self.done]
        return chunk.bytes_at[chunk.no_better_than(self._step.quality)]

    def _ended(self, size_bytes: int, seconds: float, now: float, silent_s: float) -> Stop:
        """What it was that the chunk on its way ended by, as the link's estimate has it from now on."""
        silent = not size_bytes or silent_s > _SILENT_SHARE * seconds
        self._settle(measured=not silent)
        if silent and seconds > 0:
            # Where bytes are only seen by the message, no byte says that less than all of them came: somewhere between
            # nothing and that bound. The bound itself, as a speed, would have the next get try again.
            self._peer.link.doubt(size_bytes or self._due_bytes() / 2, seconds, now)
        return Stop.SILENT if silent else Stop.LATE

    def _suppose(self, size_bytes: int, seconds: float, now: float) -> None:
        if size_bytes and seconds > 0:
            self._supposed.append(self._peer.link.suppose(size_bytes, seconds, now))

    def _settle(self, *, measured: bool) -> None:
        self._peer.link.settle(self._supposed, measured=measured)
        self._supposed = []

    def _next(self, now: float) -> Step | None:
        """The request that is best now, with `_wait_s` for its first chunk; None where recomputing is, or where that
        chunk will not come while it is waited for."""
        task, state = self._task, self._state
        speeds, fallback_s = self._speeds(careful, now), task.recompute_s[self.done]
        choice = self._choose(now)
        # The rule, whatever happens.
        wait_s = self._spent_s + (1 + SLOWER_MAX) * task.recompute_s[0] - fallback_s
        if not self._peer.link.known(now):
            # The coarsest quality, so as to know the link soonest. Where that was too cautious, the next step is finer.
            step = Step(self.done, len(task.chunks), next(iter(task.chunks[self.done].bytes_at)))
            soonest_s = state.now + speeds.latency_s
        elif choice.qualities:
            step = Step(self.done, self.done + len(choice.qualities), self._first_quality(choice, speeds))
            size = task.chunks[self.done].bytes_at[step.quality]
            takes_s = size / speeds.bytes_per_s + (speeds.latency_s if step.quality is not state.flowing else 0.0)
            to_win_s = state.now + fallback_s - choice.finish_s
            bet_s = state.now + min(_WAIT_FACTOR * takes_s, max(0.0, to_win_s))
            in_time_s = task.ttft_s - fallback_s
            wait_s = max(wait_s, bet_s)
            if in_time_s >= state.now + _WAIT_FACTOR * takes_s:
                wait_s = min(wait_s, in_time_s)
            soonest_s = state.now + takes_s
        else:
            return None
        self._wait_s = wait_s
        return step if soonest_s < wait_s else None

    def _why_not(self, now: float) -> Stop:
        """No request is worth it."""
        if self._peer.link.doubted_s(now):
            return Stop.DOUBTED
        return Stop.SLOW if self._peer.link.known(now) else Stop.UNMEASURED

    def _first_quality(self, choice: Choice, speeds: Speeds) -> Quality:
        """The finest there is, where all would come in time at the coarsest even if the link slowed down to an eighth
        while it comes; else the coarsest, to be refined."""
        task, state = self._task, self._state
        chunks = task.chunks[state.done : state.done + len(choice.qualities)]
        finest, coarsest = min(chunks[0].bytes_at), max(chunks[0].bytes_at)
        finely = [chunk.no_better_than(finest) for chunk in chunks]
        takes_s = ready_times(chunks, finely, state, speeds)[-1] - state.now
        share = sum(chunk.bytes_at[chunk.no_better_than(coarsest)] for chunk in chunks) / sum(
            chunk.bytes_at[quality] for chunk, quality in zip(chunks, finely, strict=True)
        )
        left_s = self._budget_s - task.recompute_s[state.done + len(chunks)] - state.now
        if _DROP * share * takes_s > left_s:
            self._coarsely = True
        return coarsest if self._coarsely else finest

    def _choose(self, now: float) -> Choice:
        task = self._task
        return choose(
            task.chunks, task.recompute_s, self._state, self._speeds(careful, now), self._speeds(expected, now),
            self._budget_s,
        )  # fmt: skip

    def _speeds(self, at: SpeedsAt, now: float) -> Speeds:
        """As estimated; no faster than the chunk on its way, once that is late."""
        speeds = at(self._peer, self._decode, now)
        return replace(speeds, bytes_per_s=min(speeds.bytes_per_s, self._slow))


def explained(
    task: Task, choice: Choice, peer: PeerEstimates, decode: DecodeEstimates, now: float, *, probe: bool
) -> Plan:  # fmt: skip
    """A choice that was made at the begin of a get, with its predicted times and its reason."""
    speeds = careful(peer, decode, now)
    chunks = []
    engine_s = choice.ready_s[-1] if choice.ready_s else 0.0
    for index, chunk in enumerate(task.chunks):
        fetched = index < len(choice.qualities)
        quality = choice.qualities[index] if fetched else next(iter(chunk.bytes_at))
        compute_s = task.recompute_s[index] - task.recompute_s[index + 1]
        engine_s += 0.0 if fetched else compute_s
        size = chunk.bytes_at[quality]
        chunks.append(
            PlannedChunk(
                chunk.first_token, chunk.tokens, quality if fetched else None, size, size / speeds.bytes_per_s,
                chunk.elements / speeds.decode[quality], compute_s, choice.ready_s[index] if fetched else engine_s,
            )
        )  # fmt: skip
    plan = Plan(
        tuple(chunks), choice.finish_s, task.ttft_s, task.recompute_s[0], task.tokens, speeds, probe, reason=""
    )  # fmt: skip
    return replace(plan, reason=_reason(plan))


def _reason(plan: Plan) -> str:
    """One sentence."""
    guess = "; the peer has not been measured, its first chunk will tell" if plan.probe else ""
    if plan.speeds.doubt_s:
        guess = f"; a get has given the peer up, which counts for {plan.speeds.doubt_s:.1f} s yet"
    if not plan.chunks:
        return "recompute: nothing of the prompt is stored"
    if not plan.fetched_tokens:
        return f"recompute: that is not slower than fetching at the coarsest quality{guess}"
    what = f"fetch {plan.fetched_tokens} of {plan.stored_tokens} stored tokens at {_mix(plan)}"
    if plan.fetched_tokens < plan.stored_tokens:
        what += ", recompute the rest"
    if not plan.meets_goal:
        return f"{what}: nothing is expected to meet the deadline, and this is the fastest{guess}"
    return f"{what}: the finest that keeps the deadline and is not slower than recomputing{guess}"


def _mix(plan: Plan) -> str:
    tokens: dict[Quality, int] = {}
    for chunk in plan.chunks:
        if chunk.quality is not None:
            tokens[chunk.quality] = tokens.get(chunk.quality, 0) + chunk.tokens
    if len(tokens) == 1:
        return next(iter(tokens)).label
    return " and ".join(f"{quality.label} ({count})" for quality, count in tokens.items())
