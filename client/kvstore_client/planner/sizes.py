"""How many bytes an object is at each quality, before any of it has come.

A lookup tells what all of an object takes. Its header has the length of every quality layer, so the first object read
in a namespace teaches what the others' layers are; until then the ratios of docs/performance.md stand in.
"""

from __future__ import annotations

from kvstore_codec import ObjectHeader, Quality

#: Bits an element without a profile, 256 tokens a chunk (docs/performance.md).
_BITS = {Quality.HIGH: 5.91, Quality.MEDIUM: 4.31, Quality.LOW: 2.74}
LOSSY = tuple(_BITS)  # best first
_KEPT = 0.75  # of what was known, at each header seen


class LayerSizes:
    """Shares of an object's bytes by quality, learnt from headers."""

    def __init__(self) -> None:
        self._share = {
            (stored, quality): _BITS[quality] / _BITS[stored]
            for stored in LOSSY
            for quality in LOSSY
            if quality >= stored
        }
        self._learnt = False

    def learn(self, header: ObjectHeader) -> None:
        if not header.codec.lossy:
            return
        kept = _KEPT if self._learnt else 0.0
        for quality in LOSSY[LOSSY.index(header.quality) :]:
            share = header.length_for(quality) / header.object_bytes
            key = (header.quality, quality)
            self._share[key] = kept * self._share[key] + (1 - kept) * share
        self._learnt = True

    def choices(self, stored: Quality, stored_bytes: int, best: Quality, floor: Quality) -> dict[Quality, int]:
        """Bytes to read by quality, coarsest first, none better than `best` or worse than `floor`. An exact object is
        read whole."""
        if stored.exact:
            return {stored: stored_bytes}
        return {
            quality: max(1, round(stored_bytes * self._share[stored, quality]))
            for quality in reversed(LOSSY)
            if max(stored, best) <= quality <= floor
        }
