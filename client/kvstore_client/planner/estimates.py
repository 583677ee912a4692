"""What a client has seen of its peers and of its own decoder: rates and latencies that fade.

A weighted quantile of the last pieces of work: one stall among them moves no median, two slow ones in a row do, and a
deadline is planned with a lower quantile than the middle. No clock: `now` is the caller's, in seconds.

A get that was given up has measured nothing where nothing came: the link may be slow, or the peer gone. That is a
doubt: it counts like a piece, but not for long (docs/design/0034).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
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

#: For how long a doubt counts. Each that follows on the last, with nothing measured between them, counts twice as long:
#: what is really slow is soon asked no more than twice a minute, what was gone for a moment is asked a second later.
DOUBT_S = 1.0
DOUBT_S_MAX = 30.0

#: Bytes a second of a peer that nobody has measured (1 Gbit/s). The first chunk measures it.
LINK_PRIOR = 125e6
LATENCY_PRIOR_S = 1e-3
#: What the first answer on a connection has waited for: TCP's handshake, HTTP/2's settings, and the call itself.
SETUP_ROUND_TRIPS = 3
#: Elements a second of one thread, by docs/performance.md (CF, 256 tokens a chunk, AVX-512).
DECODE_PRIORS = {
    Quality.RAW: 2300e6, Quality.LOSSLESS: 860e6, Quality.HIGH: 530e6, Quality.MEDIUM: 635e6, Quality.LOW: 820e6,
}  # fmt: skip


class Piece(NamedTuple):
    at: float
    rate: float
    until: float = math.inf  # when it is forgotten


class RateEstimate:
    """Units a second, learnt from timed pieces of work."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._pieces: deque[Piece] = deque(maxlen=PIECES_MAX)
        self._seen = 0

    def observe(self, amount: float, seconds: float, now: float, *, at_least: bool = False) -> None:
        """`amount` units took `seconds`. `at_least`: something else held the work up, so the rate may be higher; it
        counts where it is higher than the estimate. What took no time says nothing."""
        if amount <= 0 or seconds <= 0:
            return
        rate = amount / seconds
        if at_least and rate <= self.expected(now):
            return
        self._pieces.append(Piece(now, rate))
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
            for order, piece in enumerate(reversed(self._all(now)))
        ]

    def _all(self, now: float) -> Sequence[Piece]:
        """In the order in which they were seen."""
        return tuple(self._pieces)  # a copy: threads may add to it

    def _quantile(self, share: float, now: float) -> float:
        weighted = sorted([*self._weighted(now), (self._prior, PRIOR_WEIGHT)])
        left = share * sum(weight for _, weight in weighted)
        for rate, weight in weighted:
            left -= weight
            if left <= 0:
                return rate
        return weighted[-1][0]


class LinkEstimate(RateEstimate):
    """Bytes a second of a link. Some of its pieces are not measured: supposed ones, of objects on their way, and
    doubts. All but `observe` belongs to one thread."""

    def __init__(self) -> None:
        super().__init__(LINK_PRIOR)
        self._unsure: tuple[Piece, ...] = ()
        self._doubt_s = 0.0  # how long the last doubt counts
        self._measured_at = -math.inf

    def observe(self, amount: float, seconds: float, now: float, *, at_least: bool = False) -> None:
        """Ends what doubts there are: the peer is there, and this fast."""
        super().observe(amount, seconds, now, at_least=at_least)
        self._measured_at, self._doubt_s = max(self._measured_at, now), 0.0

    def suppose(self, amount: float, seconds: float, now: float) -> Piece:
        """So much of an object has come so far. Counts until `settle` says what it was."""
        piece = Piece(now, amount / seconds)
        self._unsure = (*self._unsure, piece)
        self._seen += 1
        return piece

    def settle(self, supposed: Sequence[Piece], *, measured: bool) -> None:
        """Nothing more is to come of an object: what was supposed of it was `measured`, or says nothing."""
        self._unsure = tuple(piece for piece in self._unsure if not any(piece is each for each in supposed))
        self._seen -= len(supposed)
        for piece in supposed if measured else ():
            self.observe(piece.rate, 1.0, piece.at)

    def doubt(self, amount: float, seconds: float, now: float, hold_s: float | None = None) -> None:
        """About `amount` at most came in `seconds`, then a get gave the peer up. `hold_s`: how long that counts, where
        somebody else has decided it."""
        if not self.doubted_s(now):  # else it is of the same trouble as the last: gets run side by side
            self._doubt_s = min(2 * self._doubt_s, DOUBT_S_MAX) or DOUBT_S
        until = now + (self._doubt_s if hold_s is None else hold_s)
        self._unsure = (*self._counting(now), Piece(now, amount / seconds, until))

    def answered(self, seconds: float, now: float) -> None:
        """A small question was. Where that took as long as a doubt lasts, what there was at its begin is not over: else
        a link so slow would be tried with every get."""
        asked_at = now - seconds
        if seconds > DOUBT_S / 2 and self.doubted_s(asked_at):
            self._unsure = tuple(
                piece._replace(until=max(piece.until, now + DOUBT_S)) if asked_at < piece.until < math.inf else piece
                for piece in self._unsure
            )

    def trust(self) -> None:
        """The peer has been seen to fail, which explains the doubts that there are."""
        self._unsure = tuple(piece for piece in self._unsure if piece.until == math.inf)
        self._doubt_s = 0.0

    def doubted_s(self, now: float) -> float:
        """For how long yet there is a doubt; 0: there is none."""
        return max((piece.until - now for piece in self._counting(now) if piece.until < math.inf), default=0.0)

    def _counting(self, now: float) -> list[Piece]:
        return [
            piece for piece in self._unsure
            if piece.until == math.inf or (now < piece.until and piece.at >= self._measured_at)
        ]  # fmt: skip

    def _all(self, now: float) -> Sequence[Piece]:
        unsure = self._counting(now)
        measured = super()._all(now)
        return sorted([*measured, *unsure], key=lambda piece: piece.at) if unsure else measured


class LatencyEstimate:
    """Seconds from a request to its first byte: the median of the last few."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=9)
        self._setup_s = SETUP_ROUND_TRIPS * LATENCY_PRIOR_S

    def observe(self, seconds: float, *, connected: bool = True) -> None:
        """`connected`: before the request went. A first answer on a new connection stands in for those to come."""
        if connected:
            self._seen.append(seconds)
        else:
            self._setup_s = seconds

    @property
    def expected(self) -> float:
        if not self._seen:
            return self._setup_s / SETUP_ROUND_TRIPS
        return sorted(self._seen)[(len(self._seen) - 1) // 2]  # of two the shorter: what is in the way only adds


@dataclass(frozen=True)
class Speeds:
    """What one plan is made with. `decode`: elements a second of all threads, by quality. `doubt_s`: for so many
    seconds yet `bytes_per_s` rests on a get that gave the peer up, too; 0: on what was measured alone."""

    bytes_per_s: float
    latency_s: float
    decode: dict[Quality, float]
    doubt_s: float = 0.0


class PeerEstimates:
    """The link to one node."""

    def __init__(self) -> None:
        self.link = LinkEstimate()
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
    return Speeds(peer.link.careful(now), peer.latency.expected, decode.expected(now), peer.link.doubted_s(now))


def expected(peer: PeerEstimates, decode: DecodeEstimates, now: float) -> Speeds:
    """Speeds as they most likely are."""
    return Speeds(peer.link.expected(now), peer.latency.expected, decode.expected(now), peer.link.doubted_s(now))


SpeedsAt = Callable[[PeerEstimates, DecodeEstimates, float], Speeds]
