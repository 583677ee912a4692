"""What no rule can do that sees the link only as far as it has come: a bound for `bench.planner`'s stepped links.

Until its step a stepped link is the link that stays as it began, and a rule does the same on both. So what it does by
then must suit both: on the link that stays it must not be slower than recomputing by more than 5 %, and must keep a
deadline that can be kept. Fetching the coarsest quality from the beginning on is the best that can have been done when
the step comes, whatever is wanted afterwards: no other has brought as many chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.planner_cases import Case
from bench.planner_contestants import played
from bench.planner_links import Link
from kvstore_codec import Quality

SLOWER_MAX = 1.05  # of recomputing everything


@dataclass(frozen=True)
class Bound:
    """`in_time`: whether such a rule can keep the deadline; `slowdown`: the least, against recomputing, that one comes
    to which keeps the deadline of the link that stays."""

    in_time: bool
    slowdown: float


def bound(case: Case) -> Bound:
    """Of other links than stepped ones: what the oracle can do, which is no worse."""
    recompute_s = case.recompute_s
    best_s = min(_finish_s(case, count) for count in range(len(case.task.chunks) + 1))
    if case.deadline_s >= recompute_s or len(case.link.starts) != 2:
        return Bound(min(best_s, recompute_s) <= case.deadline_s, min(best_s, recompute_s) / recompute_s)
    stays = replace(case, link=Link(case.link.name, case.link.starts[:1], case.link.rates[:1], case.link.latency_s))
    step_s = case.link.starts[1]
    counts = range(len(case.task.chunks) + 1)
    before = max(count for count in counts if _arrival_s(stays, count) <= step_s)
    gives_up_s = step_s + case.task.recompute_s[before]
    stays_s = min([gives_up_s, *(_finish_s(stays, count) for count in counts if count > before)])
    may_wait = stays_s <= SLOWER_MAX * recompute_s
    in_time = any(
        _finish_s(case, count) <= case.deadline_s for count in counts if count <= before or may_wait
    )  # fmt: skip
    if any(_finish_s(stays, count) <= case.deadline_s for count in counts if count <= before):
        return Bound(in_time, 1.0)  # by what has come before the step
    must_wait = any(_finish_s(stays, count) <= case.deadline_s for count in counts)
    least_s = min([gives_up_s, *(_finish_s(case, count) for count in counts if count > before)])
    return Bound(in_time, max(1.0, least_s / recompute_s) if must_wait else 1.0)


def _finish_s(case: Case, count: int) -> float:
    return played(case, [Quality.LOW] * count).ttft_s


def _arrival_s(case: Case, count: int) -> float:
    """When the first `count` chunks have come at the coarsest quality; 0 of none."""
    size = sum(sizes[Quality.LOW] for sizes in case.size_bytes[:count])
    return case.link.arrival(case.link.latency_s, size) if count else 0.0
