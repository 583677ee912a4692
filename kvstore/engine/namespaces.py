"""Layouts by namespace id, so that an operator sees models instead of hashes; kept on disk beside the objects."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from kvstore.errors import InvalidRequest
from kvstore_codec import KVLayout, LayoutError, namespace_id_of

log = logging.getLogger(__name__)

NAMESPACES_MAX = 10_000


class Namespaces:
    """`directory` None: memory only."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._layouts: dict[bytes, KVLayout] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.iterdir()):
                self._load(path)

    def __len__(self) -> int:
        return len(self._layouts)

    def get(self, namespace_id: bytes) -> KVLayout | None:
        return self._layouts.get(namespace_id)

    def check(self, namespace_id: bytes, layout_bytes: bytes) -> KVLayout:
        """The layout that `layout_bytes` are. Raises InvalidRequest if they are none, or not of this namespace."""
        known = self._layouts.get(namespace_id)
        if known is not None and known.canonical_bytes == layout_bytes:
            return known
        if namespace_id_of(layout_bytes) != namespace_id:
            raise InvalidRequest("the layout does not hash to the namespace id")
        if len(self._layouts) >= NAMESPACES_MAX:
            raise InvalidRequest("this node holds no more namespaces: purge one first", limit=NAMESPACES_MAX)
        try:
            return KVLayout.from_canonical_bytes(layout_bytes)
        except LayoutError as error:
            raise InvalidRequest(f"bad layout: {error}") from None

    def remember(self, layout: KVLayout) -> bool:
        """Whether it is new here, and so is to be `save`d."""
        if layout.namespace_id in self._layouts:
            return False
        self._layouts[layout.namespace_id] = layout
        return True

    def save(self, layout: KVLayout) -> None:
        """Writes it beside the objects (blocking). Raises OSError."""
        if self._directory is None:
            return
        path = self._directory / f"{layout.namespace_id.hex()}.json"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(layout.canonical_bytes)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)

    def forget(self, namespace_id: bytes) -> bool:
        """Whether it was known here, and so is to be `erase`d."""
        return self._layouts.pop(namespace_id, None) is not None

    def erase(self, namespace_id: bytes) -> None:
        """Removes what `save` wrote (blocking). Raises OSError."""
        if self._directory is not None:
            (self._directory / f"{namespace_id.hex()}.json").unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        if not path.is_file():
            log.warning("ignored %s: not a file", path)
            return
        try:
            layout = KVLayout.from_canonical_bytes(path.read_bytes())
        except LayoutError:
            layout = None
        if layout is None or path.name != f"{layout.namespace_id.hex()}.json":
            log.warning("removed %s: not a layout", path)
            path.unlink()
        else:
            self._layouts[layout.namespace_id] = layout
