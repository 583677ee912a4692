"""Arguments of a namespace's calls, checked. All raise InvalidArgument."""

from __future__ import annotations

from kvstore_client.errors import InvalidArgument
from kvstore_codec import KVLayout, Quality

LEASE_MS_MAX = 2**32 - 1  # as the protocol can say it
PRIORITY_MAX = 100
RETAIN_S_MAX = 365 * 86_400


def retention(hint: tuple[int, int] | None) -> tuple[int, int] | None:
    if hint is not None and not (0 <= hint[0] <= PRIORITY_MAX and 0 < hint[1] <= RETAIN_S_MAX):
        raise InvalidArgument(
            f"retain is (priority 0–{PRIORITY_MAX}, seconds 1–{RETAIN_S_MAX})", priority=hint[0], seconds=hint[1]
        )
    return hint


def qualities(quality: str | Quality | None, min_quality: str | Quality) -> tuple[Quality, Quality]:
    """(read no better than, nothing worse than)."""
    wanted = Quality.RAW if quality is None else Quality.parse(quality)
    floor = Quality.parse(min_quality)
    if wanted > floor:
        raise InvalidArgument(
            "quality is worse than min_quality: ask for less, or lower min_quality",
            quality=wanted.label, min_quality=floor.label,
        )  # fmt: skip
    return wanted, floor


def check_first_token(layout: KVLayout, first_token: int) -> None:
    if first_token < 0 or first_token % layout.chunk_tokens:
        raise InvalidArgument(
            "first_token must be a multiple of chunk_tokens", first_token=first_token,
            chunk_tokens=layout.chunk_tokens,
        )  # fmt: skip


def check_lease_ms(lease_ms: int) -> None:
    """Raises InvalidArgument."""
    if not 0 <= lease_ms <= LEASE_MS_MAX:
        raise InvalidArgument(f"lease_ms must be 0–{LEASE_MS_MAX}", lease_ms=lease_ms)
