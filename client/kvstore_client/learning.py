"""Learning a namespace's statistics profile from the KV of its first puts."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import kvstore_codec as codec
from kvstore_codec import KVArray, KVLayout, Profile, arrays

#: What a profile is learned from. Copied, as the caller may overwrite its arrays once a put has ended.
SAMPLE_TOKENS = 1024


class Learner:
    """Copies chunks until there are enough of them, then makes the profile. Its methods may run in any thread."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._sample: list[tuple[KVArray, int]] = []
        self._tokens = 0
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return self._tokens >= SAMPLE_TOKENS

    def see(self, chunks: Sequence[tuple[KVArray, int]]) -> bool:
        """Copies of `chunks`, (kv, first position) of each, what is needed yet. True, once, when it is enough."""
        with self._lock:
            if self.is_full:
                return False
            for kv, first_position in chunks:
                if self.is_full:
                    break
                copy = copied(kv, self._layout)
                self._sample.append((copy, first_position))
                self._tokens += codec.token_count(copy, self._layout)
            return self.is_full

    def learn(self) -> Profile:
        """The profile of what was seen, which is then let go. Raises codec.CodecError where it teaches nothing."""
        sample, self._sample = self._sample, []
        return codec.learn_statistics(sample, self._layout)


def copied(kv: KVArray, layout: KVLayout) -> KVArray:
    """`kv` in memory of its own. Raises LayoutError where it does not fit `layout`."""
    planes = arrays.planes(kv, layout)
    copy = codec.empty(layout, planes[0].shape[0])
    for source, target in zip(planes, arrays.planes(copy, layout), strict=True):
        arrays.write(target, arrays.read(source) if isinstance(source, arrays.PagedPlane) else source)
    return copy
