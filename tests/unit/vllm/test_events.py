"""Events of stored blocks: for what the node has, and of nothing that its hashes do not tell."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from kvstore_client.integrations.vllm.events import SAVES_MAX, StoredBlocks, StoredEvents
from kvstore_client.integrations.vllm.identity import RequestKey
from kvstore_client.integrations.vllm.work import Report, Save

HASHES = [bytes([number]) * 32 for number in range(8)]
REQUEST = SimpleNamespace(block_hashes=HASHES)


def save(save_id: int, first: int = 0, last: int = 32, **key: object) -> Save:
    return Save("r", RequestKey(**key), np.arange(last, dtype=np.uint32), first, (1, 2), save_id)  # type: ignore[arg-type]


def test_blocks_are_told_when_the_node_has_them() -> None:
    events = StoredEvents(16, workers=1)
    events.saving(save(1), REQUEST)
    events.saving(save(2, 32, 64, adapter=("a", "/a")), REQUEST)
    assert events.take() == []
    events.stored({2: 1})
    assert events.take() == [StoredBlocks(HASHES[2:4], HASHES[1], list(range(32, 64)), "a")]
    events.stored({1: 1, 7: 1})
    assert events.take() == [StoredBlocks(HASHES[:2], None, list(range(32)), None)]
    assert events.take() == []


def test_all_workers_have_to_have_stored_their_part() -> None:
    events = StoredEvents(16, workers=3)
    events.saving(save(1), REQUEST)
    events.stored(Report({}, {1: 1}).merged(Report({}, {1: 1})).stored)
    assert events.take() == []
    events.stored({1: 1})
    assert len(events.take()) == 1


def test_what_a_hash_does_not_tell_everybody_is_not_told() -> None:
    events = StoredEvents(16, workers=1)
    events.saving(save(1, salt="x"), REQUEST)
    events.saving(save(2, content=((0, 4, "image"),)), REQUEST)
    events.saving(save(3), SimpleNamespace(block_hashes=[]))
    events.stored({1: 1, 2: 1, 3: 1})
    assert events.take() == []


def test_saves_that_fail_are_not_kept_for_ever() -> None:
    events = StoredEvents(16, workers=1)
    for number in range(SAVES_MAX + 10):
        events.saving(save(number), REQUEST)
    events.stored({9: 1, 10: 1})
    assert len(events.take()) == 1
