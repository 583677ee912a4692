"""A trace of requests: when each came, and the blocks of its prompt.

The format of the Mooncake traces (kvcache-ai/Mooncake): one JSON object a line with `timestamp` (milliseconds) and
`hash_ids` (the prompt's blocks in order), plain or compressed by zstd.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import zstandard

from kvstore.errors import Code, KvStoreError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class TraceUnusable(KvStoreError):
    """A file is not a trace. The message names the line and what it must be."""

    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.INVALID_REQUEST, **context)


@dataclass(frozen=True)
class Trace:
    """Blocks are numbered from 0 in the order of their first use; `parents` holds each one's block before it, or -1.

    `renamed`: one id followed different blocks, so ids were not hashes of prefixes. A block's KV depends on everything
    before it, so blocks are then told apart by their whole prefix.
    """

    name: str
    times_s: Sequence[float]
    requests: Sequence[Sequence[int]]
    parents: Sequence[int]
    tokens: Sequence[int]  # of each request's prompt; empty where the trace does not say
    renamed: bool = False

    @property
    def unique_blocks(self) -> int:
        return len(self.parents)

    @cached_property
    def block_tokens(self) -> int:
        """The power of two that fits every request's length; 0 where the trace has no lengths."""
        most = max(
            (-(-tokens // len(ids)) for tokens, ids in zip(self.tokens, self.requests, strict=False) if ids), default=0
        )
        return 1 << (most - 1).bit_length() if most else 0

    @cached_property
    def blocks(self) -> int:
        """All requests' together."""
        return sum(map(len, self.requests))


def number(name: str, requests: Iterable[tuple[float, Sequence[Any], int | None]]) -> Trace:
    """Makes a trace of (seconds, ids of blocks, tokens or None) in order of time."""
    listed = list(requests)
    renamed = not _chained(ids for _, ids, _ in listed)
    numbers: dict[Any, int] = {}
    parents: list[int] = []
    numbered: list[list[int]] = []
    for _, ids, _ in listed:
        parent = -1
        blocks: list[int] = []
        for id_ in ids:
            key = (parent, id_) if renamed else id_
            block = numbers.get(key, -1)
            if block < 0:
                block = numbers[key] = len(parents)
                parents.append(parent)
            blocks.append(block)
            parent = block
        numbered.append(blocks)
    tokens = [count for _, _, count in listed if count is not None]
    return Trace(
        name, [time_s for time_s, _, _ in listed], numbered, parents,
        tokens if len(tokens) == len(listed) else (), renamed,
    )  # fmt: skip


def load(path: Path) -> Trace:
    """Raises TraceUnusable, which names what is wrong."""
    try:
        text = _plain(path.read_bytes(), path).decode()
    except OSError as error:
        raise TraceUnusable(f"{path}: {error.strerror}") from None
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        raise TraceUnusable(f"{path} is damaged or not a trace of JSON lines: {error}") from None
    return number(path.name, _requests(text.splitlines(), path))


def _plain(data: bytes, path: Path) -> bytes:
    if not data.startswith(ZSTD_MAGIC):
        return data
    plain = bytearray()
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        plain += frame.decompress(data)
        if not frame.eof:  # the library takes a file that was cut off for a short one
            raise TraceUnusable(f"{path} is damaged: it ends inside a zstd frame; fetch it again")
        data = frame.unused_data
    return bytes(plain)


def _requests(lines: Iterable[str], path: Path) -> Iterator[tuple[float, list[Any], int | None]]:
    last_ms = float("-inf")
    count = 0
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {line_number}"
        try:
            request = json.loads(line)
        except ValueError:
            raise TraceUnusable(f'{where}: not JSON; a line is {{"timestamp": 0, "hash_ids": [1, 2]}}') from None
        ids = request.get("hash_ids") if isinstance(request, dict) else None
        if not isinstance(ids, list) or not all(isinstance(id_, int | str) for id_ in ids):
            raise TraceUnusable(f"{where}: it needs hash_ids, a list of numbers or strings")
        time_ms = request.get("timestamp")
        if not isinstance(time_ms, int | float) or time_ms < last_ms:
            raise TraceUnusable(f"{where}: it needs a timestamp in milliseconds, no earlier than the line before")
        last_ms = time_ms
        tokens = request.get("input_length")
        yield time_ms / 1000, ids, tokens if isinstance(tokens, int) else None
        count += 1
    if not count:
        raise TraceUnusable(f"{path} has no requests")


def _chained(requests: Iterable[Sequence[Any]]) -> bool:
    """Whether every id always follows the same id, as a hash of the whole prefix does."""
    parents: dict[Any, Any] = {}
    for ids in requests:
        parent: Any = None
        for id_ in ids:
            if parents.setdefault(id_, parent) != parent:
                return False
            parent = id_
    return True
