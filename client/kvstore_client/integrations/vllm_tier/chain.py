"""Which chunks of which prompt vLLM's keys are.

vLLM names an offload chunk by the hash of its last block (of the whole prefix) and the number of its cache group. The
store needs more: the chunks before it, which nodes are chosen by and eviction goes by, and its position, which keys are
un-rotated by. A request's context has both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

KEY_BYTES = 32 + 4  # sha256, and the group's number


class Chain:
    """The chunks of one request so far, in the prompt's order. One thread notes them; others may read what is there.

    `hashes`: vLLM's, one a chunk, from the prompt's first on."""

    def __init__(self, chunk_tokens: int) -> None:
        self.hashes: list[bytes] = []
        self._chunk_tokens = chunk_tokens
        self._numbers: dict[bytes, int] = {}
        self._seen = 0

    def note(self, ends: Mapping[bytes, int]) -> None:
        """`ends`: of all the request's keys the token behind their chunk, older keys first."""
        for key, end in islice(ends.items(), self._seen, None):
            number = end // self._chunk_tokens - 1
            if len(key) == KEY_BYTES and end % self._chunk_tokens == 0 and number == len(self.hashes):
                self.hashes.append(key[:-4])
                self._numbers[key] = number  # last: who finds it finds its hash
        self._seen = len(ends)

    def number(self, key: bytes) -> int | None:
        """Of the chunk in its prompt; None of a key that is none of its whole chunks, or no sha256."""
        return self._numbers.get(key)


def runs(numbers: Sequence[int]) -> Iterator[slice]:
    """Where chunks that follow each other stand in `numbers`."""
    first = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield slice(first, at)
            first = at
