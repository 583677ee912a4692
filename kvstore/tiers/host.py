"""Objects in this process's memory."""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.errors import TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.base import Bytes, StoredObject


class HostTier:
    """Holds the buffers it is given, without copying: the caller never writes to them again."""

    name = "host"

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._objects: dict[ObjectKey, memoryview] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def objects(self) -> int:
        return len(self._objects)

    def cost_bytes(self, length: int) -> int:
        return length

    def put(self, key: ObjectKey, parent: bytes, data: Bytes) -> None:
        replaced = self._objects.get(key)
        used = self._used_bytes + len(data) - (0 if replaced is None else len(replaced))
        if used > self.capacity_bytes:
            raise TierFull("host tier has no room", needed=len(data), free=self.capacity_bytes - self._used_bytes)
        self._objects[key] = memoryview(data).toreadonly()
        self._used_bytes = used

    def read(self, key: ObjectKey, length: int) -> memoryview | None:
        held = self._objects.get(key)
        return held[:length] if held is not None and len(held) >= length else None

    def delete(self, key: ObjectKey) -> bool:
        held = self._objects.pop(key, None)
        self._used_bytes -= 0 if held is None else len(held)
        return held is not None

    def scan(self) -> Iterator[StoredObject]:
        """Nothing: memory does not outlive the process."""
        return iter(())
