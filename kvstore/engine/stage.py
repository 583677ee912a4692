"""A put in flight: bytes that arrived, visible to nobody, until commit or abort."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.engine.model import Offer, Verdict
from kvstore.errors import InvalidRequest
from kvstore_codec import KVLayout


class Stage:
    """Holds a reservation of `reserved_bytes`, which `close` gives back, once.

    `first_chunk`: hash of the prompt's first chunk; empty: it is the first that is offered."""

    def __init__(
        self, layout: KVLayout, part: int, offers: Sequence[Offer], verdicts: Sequence[Verdict],
        release: Callable[[int, int], None], first_chunk: bytes = b"",
    ) -> None:  # fmt: skip
        self.layout = layout
        self.first_chunk = first_chunk or next((offer.hash for offer in offers), b"")
        self.part = part
        self.offers = list(offers)
        self.verdicts = list(verdicts)
        self._release = release
        self._buffers = {
            index: bytearray(offer.object_bytes)
            for index, (offer, verdict) in enumerate(zip(offers, verdicts, strict=True))
            if verdict == "send"
        }
        self._received = dict.fromkeys(self._buffers, 0)
        self.reserved_objects = len(self._buffers)
        self.reserved_bytes = sum(map(len, self._buffers.values()))

    def write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        """The next piece of a wanted object. Raises InvalidRequest when it is unwanted, out of order or too long."""
        buffer = self._buffers.get(index)
        if buffer is None:
            raise InvalidRequest("a piece of an object that was not wanted", index=index)
        if offset != self._received[index] or offset + len(data) > len(buffer):
            raise InvalidRequest(
                "a piece out of order or too long", index=index, offset=offset, expected=self._received[index]
            )
        buffer[offset : offset + len(data)] = data
        self._received[index] += len(data)

    def take(self, index: int) -> bytearray | None:
        """A complete object's bytes, given away; None if pieces are missing."""
        buffer = self._buffers.get(index)
        if buffer is None or self._received[index] != len(buffer):
            return None
        return self._buffers.pop(index)

    def close(self) -> None:
        """Frees what was not taken. Idempotent."""
        self._buffers.clear()
        self._release(self.reserved_objects, self.reserved_bytes)
        self.reserved_objects = self.reserved_bytes = 0
