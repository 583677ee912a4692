"""Hard pins, kept on disk beside the objects: what an operator pinned is pinned after a restart."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from kvstore.index.entry import ObjectKey

log = logging.getLogger(__name__)


class PinFile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[ObjectKey]:
        """What `save` wrote last; nothing where there is no such file, or it is no such file. Raises OSError."""
        try:
            found = json.loads(self._path.read_bytes())
            return [ObjectKey(bytes.fromhex(each[0]), bytes.fromhex(each[1]), int(each[2])) for each in found]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, LookupError):
            log.warning("ignored %s: not a list of pins", self._path)
            return []

    def save(self, keys: Sequence[ObjectKey]) -> None:
        """Replaces the file at once (blocking). Raises OSError."""
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump([[key.namespace_id.hex(), key.chunk_hash.hex(), key.part] for key in keys], file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._path)
