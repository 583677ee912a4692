"""A put in flight: bytes that arrived, visible to nobody, until commit or abort.

They arrive where they are to stay: in memory's own room, made when an object's first byte is there, so that storing it
copies nothing. Where there is no room yet, in a buffer of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.engine.model import Offer, Verdict
from kvstore.errors import InvalidRequest
from kvstore.index.entry import ObjectKey
from kvstore.index.held import Entry
from kvstore.tiers.host import Reserved
from kvstore_codec import KVLayout, ObjectError, ObjectHeader

#: What arrives of one object: memory's own room, or a buffer.
Staged = Reserved | bytearray
#: What a look at one object found: its header, or what is wrong with it.
Checked = ObjectHeader | ObjectError


class Stage:
    """Holds a reservation of `reserved_bytes`, which `close` gives back, once.

    `allocate`: memory's room for one of `offers`, by its index, or a buffer; `release`: gives back such room. Only
    the event loop's thread calls its methods; what `buffer` and `room` return may be written by another, until `take`
    or `close` (what is written later hits nothing else). `first_chunk`: hash of the prompt's first chunk; empty: it is
    the first that is offered."""

    def __init__(
        self, layout: KVLayout, part: int, offers: Sequence[Offer], verdicts: Sequence[Verdict],
        allocate: Callable[[Stage, int], Staged], release: Callable[[Stage, Sequence[Staged]], None],
        first_chunk: bytes = b"",
    ) -> None:  # fmt: skip
        self.layout = layout
        self.first_chunk = first_chunk or next((offer.hash for offer in offers), b"")
        self.part = part
        self.offers = list(offers)
        self.verdicts = list(verdicts)
        self.keys = [ObjectKey(layout.namespace_id, offer.hash, part) for offer in offers]
        self._chain = frozenset(self.keys)
        self._allocate, self._release = allocate, release
        wanted = [index for index, verdict in enumerate(verdicts) if verdict == "send"]
        self._received = dict.fromkeys(wanted, 0)
        self._staged: dict[int, Staged] = {}
        self._checked: dict[int, Checked] = {}
        self.reserved_objects = len(wanted)
        self.reserved_bytes = sum(offers[index].object_bytes for index in wanted)

    def may_go(self, entry: Entry) -> bool:
        """A put does not make room for its later chunks at the cost of its first: they would be dead weight."""
        return entry.key not in self._chain

    def room(self, index: int, offset: int, size: int) -> memoryview:
        """Where the next piece of a wanted object goes, of `size` bytes: it counts as there, and is to be written
        before the commit. Raises InvalidRequest when it is unwanted, out of order or too long."""
        received = self._received.get(index)
        if received is None:
            raise InvalidRequest("a piece of an object that was not wanted", index=index)
        if offset != received or offset + size > self.offers[index].object_bytes:
            raise InvalidRequest("a piece out of order or too long", index=index, offset=offset, expected=received)
        room = self.buffer(index)[offset : offset + size]
        self._received[index] += size
        return room

    def write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        """The same, and writes it."""
        self.room(index, offset, len(data))[:] = data

    def buffer(self, index: int) -> memoryview:
        """Where the bytes of a wanted object go, all of them. Raises InvalidRequest."""
        if index not in self._received:
            raise InvalidRequest("an object that was not wanted, or came already", index=index)
        if index not in self._staged:
            self._staged[index] = self._allocate(self, index)
        return bytes_of(self._staged[index])

    def arrived(self, index: int, checked: Checked) -> None:
        """All of `buffer` has been written, by who has checked it (`commit.check`) and does not touch it any more."""
        self._received[index] = self.offers[index].object_bytes
        self._checked[index] = checked

    def checked(self, index: int) -> Checked | None:
        """What `arrived` was told of an object."""
        return self._checked.get(index)

    def take(self, index: int) -> Staged | None:
        """A complete object, given away; None if pieces are missing."""
        if self._received.get(index) != self.offers[index].object_bytes:
            return None
        del self._received[index]
        return self._staged.pop(index)

    def close(self) -> None:
        """Frees what was not taken. Idempotent."""
        self._received.clear()
        self._checked.clear()
        staged, self._staged = list(self._staged.values()), {}
        self._release(self, staged)
        self.reserved_objects = self.reserved_bytes = 0


def bytes_of(staged: Staged) -> memoryview:
    return staged.view if isinstance(staged, Reserved) else memoryview(staged)
