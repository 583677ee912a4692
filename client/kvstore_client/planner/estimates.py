"""What a client has seen of its peers and of its own decoder: rates and latencies that fade.

A weighted quantile of the last pieces of work: one stall among them moves no median, two slow ones in a row do, and a
deadline is planned with a lower quantile than the middle. No clock: `now` is the caller's, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvstore_codec import Quality

PIECES_MAX = 32
#: Pieces until a sample weighs half: few, since links change within a get.
HALF_LIFE_PIECES = 3.0
#: Seconds until a sample weighs half: between the gets of one client.
HALF_LIFE_S = 60.0
PRIOR_WEIGHT = 0.05
#: Below this summed weight a rate counts as not measured.
KNOWN_WEIGHT_MIN = 0.25
#: For deadlines: slower than this is seen in a quarter of the time …
CAREFUL_QUANTILE = 0.25
#: … and from one piece nobody knows how much it varies: a discount that falls with the number of pieces.
DISCOUNT_OF_ONE_PIECE = 0.3

#: Bytes a second of a peer that nobody has measured (1 Gbit/s). The first chunk measures it.
LINK_PRIOR = 125e6
LATENCY_PRIOR_S = 1e-3
#: Elements a second of one thread, by docs/performance.md (CF, 256 tokens a chunk, AVX-512).
DECODE_PRIORS = {
    Quality.RAW: 2300e6, Quality.LOSSLESS: 860e6, Quality.HIGH: 530e6, Quality.MEDIUM: 635e6, Quality.LOW: 820e6,
}  # fmt: skip


class _Piece(NamedTuple):
    at: float
    rate: float


class RateEstimate:
    """Units a second, learnt from timed pieces of work."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._pieces: deque[_Piece] = deque(maxlen=PIECES_MAX)
        self._seen = 0

    def observe(self, amount: float, seconds: float, now: float, *, at_least: bool = False) -> None:
        """`amount` units took `seconds`. `at_least`: something else held the work up, so the rate may be higher; it
        counts where it is higher than the estimate. What took no time says nothing."""
        if amount <= 0 or seconds <= 0:
            return
        rate = amount / seconds
        if at_least and rate <= self.expected(now):
            return
        self._pieces.append(_Piece(now, rate))
        self._seen += 1

    def known(self, now: float) -> bool:
        """Whether something was measured lately."""
        return sum(weight for _, weight in self._weighted(now)) >= KNOWN_WEIGHT_MIN

    def expected(self, now: float) -> float:
        """The weighted median."""
        return self._quantile(0.5, now)

    def careful(self, now: float) -> float:
        """What a deadline is planned with: at most `expected`."""
        discount = 1 - DISCOUNT_OF_ONE_PIECE / max(1, self._seen)
        return discount * self._quantile(CAREFUL_QUANTILE, now)

    def _weighted(self, now: float) -> list[tuple[float, float]]:
        """(rate, weight) of each piece, newest first."""
        return [
            (piece.rate, 0.5 ** (order / HALF_LIFE_PIECES + max(0.0, now - piece.at) / HALF_LIFE_S))
            for order, piece in enumerate(reversed(tuple(self._pieces)))  # a copy: threads may add to it
        ]

    def _quantile(self, share: float, now: float) -> float:
        weighted = sorted([*self._weighted(now), (self._prior, PRIOR_WEIGHT)])
        left = share * sum(weight for _, weight in weighted)
        for rate, weight in weighted:
            left -= weight
            if left <= 0:
                return rate
        return weighted[-1][0]


class LatencyEstimate:
    """Seconds from a request to its first byte: the median of the last few."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=9)

    def observe(self, seconds: float) -> None:
        self._seen.append(seconds)

    @property
    def expected(self) -> float:
        return sorted(self._seen)[len(self._seen) // 2] if self._seen else LATENCY_PRIOR_S


@dataclass(frozen=True)
class Speeds:
    """What one plan is made with. `decode`: elements a second of all threads, by quality."""

    bytes_per_s: float
    latency_s: float
    decode: dict[Quality, float]


class PeerEstimates:
    """The link to one node."""

    def __init__(self) -> None:
        self.link = RateEstimate(LINK_PRIOR)
        self.latency = LatencyEstimate()


class DecodeEstimates:
    """The decoder's speed by quality, of one namespace: what its objects are coded with decides it. Where a quality was
    not measured, it is as much slower than its prior as the others are: on a busy machine it would look fast.
    `observe` may be called from any thread."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._rates = {quality: RateEstimate(prior) for quality, prior in DECODE_PRIORS.items()}
        self._machine = RateEstimate(1.0)  # as a multiple of the priors

    def observe(self, quality: Quality, elements: int, seconds: float, now: float) -> None:
        self._rates[quality].observe(elements, seconds, now)
        self._machine.observe(elements / DECODE_PRIORS[quality], seconds, now)

    def expected(self, now: float) -> dict[Quality, float]:
        machine = self._machine.expected(now)
        return {
            quality: self._threads * (rate.expected(now) if rate.known(now) else machine * DECODE_PRIORS[quality])
            for quality, rate in self._rates.items()
        }


def careful(peer: PeerEstimates, decode: DecodeEstimates, now: float) -> Speeds:
    """Speeds to keep a deadline with."""
    return Speeds(peer.link.careful(now), peer.latency.expected, decode.expected(now))


def expected(peer: PeerEstimates, decode: DecodeEstimates, now: float) -> Speeds:
    """Speeds as they most likely are."""
    return Speeds(peer.link.expected(now), peer.latency.expected, decode.expected(now))


SpeedsAt = Callable[[PeerEstimates, DecodeEstimates, float], Speeds]
