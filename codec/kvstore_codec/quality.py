"""The five qualities, and how each is reached from stored bytes.

Best first: `raw` (bytes as given), `lossless` (entropy coded, exact), `high`, `medium`, `low`. The last three
are one object read to different depths: `low` is its quality layer 0, `medium` adds one refinement, `high` two.
"""

from __future__ import annotations

from enum import IntEnum

from kvstore_codec.errors import LayoutError


class Quality(IntEnum):
    """Ordered by loss: a smaller number is a better quality. The numbers are stored (FORMAT.md)."""

    RAW = 0
    LOSSLESS = 1
    HIGH = 2
    MEDIUM = 3
    LOW = 4

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def exact(self) -> bool:
        return self <= Quality.LOSSLESS

    @classmethod
    def parse(cls, value: str | Quality) -> Quality:
        """Raises LayoutError naming the qualities for anything that is not one of them."""
        if isinstance(value, Quality):
            return value
        try:
            return cls[str(value).upper()]
        except KeyError:
            names = ", ".join(f'"{quality.label}"' for quality in cls)
            raise LayoutError(f"unknown quality {value!r}: use one of {names}") from None

    @classmethod
    def of_lossy_layers(cls, layers: int) -> Quality:
        """Quality reached by the first `layers` (1–3) quality layers of a lossy object."""
        return cls(cls.LOW - (layers - 1))

    @property
    def lossy_layers(self) -> int:
        """Quality layers of a lossy object that this quality reads (1–3); exact qualities have none."""
        return Quality.LOW - self + 1 if not self.exact else 0
