"""What the nodes upstream have not been told yet: objects that did not arrive where they belong, and deletes.

In memory and bounded, without I/O. The bytes of an object are not kept here but where the node stores it: what it
evicts meanwhile is owed no more. Objects of a prompt stay in the order in which they were put, parents first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvstore.engine.outside import Prompt
from kvstore.index.entry import ObjectKey
from kvstore_cluster.placement import rank

OBJECTS_MAX = 1 << 16  # 300 bytes each
DELETES_MAX = 1 << 16

WHOLE_NAMESPACE = b""  # instead of a chunk's hash


class OwedObject(NamedTuple):
    """An object that its node lacks. `first`: hash of the prompt's first chunk."""

    key: ObjectKey
    first: bytes

    @property
    def prompt(self) -> Prompt:
        return self.key.namespace_id, self.key.part, self.first


class OwedDelete(NamedTuple):
    """A delete that the node `address` has not heard of."""

    address: str
    namespace_id: bytes
    part: int
    chunk_hash: bytes


Record = OwedObject | OwedDelete


class Owed:
    """`changed` is told what is owed from now on (True), and what is not any more."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._addresses = tuple(dict.fromkeys(addresses))
        self._objects_max = OBJECTS_MAX // len(self._addresses)  # of each: one may be gone for good
        self._prompts: dict[str, dict[Prompt, dict[ObjectKey, None]]] = {each: {} for each in self._addresses}
        self._counts = dict.fromkeys(self._addresses, 0)
        self._prompt_of: dict[ObjectKey, Prompt] = {}
        self._deletes: dict[str, dict[tuple[bytes, int], dict[bytes, None]]] = {each: {} for each in self._addresses}
        self.deletes = 0
        self.changed: Callable[[Record, bool], None] = _told_nobody

    @property
    def objects(self) -> int:
        return len(self._prompt_of)

    def home(self, prompt: Prompt) -> str:
        """Of the node that a prompt's objects belong to: the one that a client asks first."""
        namespace_id, _, first = prompt
        return rank(self._addresses, namespace_id + first)[0]

    def load(self, records: Iterable[Record]) -> list[Record]:
        """Takes what was owed in another life; returns what is not to be remembered: of nodes that are upstream no
        more, or beyond the bounds."""
        return [record for record in records if not self._add(record)]

    def owe(self, record: Record) -> bool:
        """Whether it is remembered: False beyond the bounds."""
        added = self._add(record)
        if added:
            self.changed(record, True)
        return added

    def settle(self, key: ObjectKey) -> bool:
        """The object is where it belongs, or nowhere. Whether it was owed."""
        prompt = self._prompt_of.pop(key, None)
        if prompt is None:
            return False
        home = self.home(prompt)
        keys = self._prompts[home][prompt]
        del keys[key]
        self._counts[home] -= 1
        if not keys:
            del self._prompts[home][prompt]
        self.changed(OwedObject(key, prompt[2]), False)
        return True

    def settle_namespace(self, namespace_id: bytes) -> None:
        for key in [key for key in self._prompt_of if key.namespace_id == namespace_id]:
            self.settle(key)

    def owes(self, key: ObjectKey) -> bool:
        return key in self._prompt_of

    def next_objects(self, addresses: Iterable[str], count: int) -> list[OwedObject]:
        """Of the prompts that wait longest for these nodes, each prompt's in their order."""
        waiting = (
            OwedObject(key, first)
            for address in addresses
            for (_, _, first), keys in self._prompts[address].items()
            for key in keys
        )
        return list(itertools.islice(waiting, count))

    def postpone(self, prompt: Prompt) -> None:
        """Other prompts come before it."""
        prompts = self._prompts[self.home(prompt)]
        if prompt in prompts:
            prompts[prompt] = prompts.pop(prompt)

    def owes_deletes(self, address: str) -> bool:
        return bool(self._deletes[address])

    def next_deletes(self, address: str, count: int) -> list[OwedDelete]:
        """Some of one namespace and part; of a whole namespace, that one alone."""
        for (namespace_id, part), hashes in self._deletes[address].items():
            some = itertools.islice(hashes, count)
            return [OwedDelete(address, namespace_id, part, chunk_hash) for chunk_hash in some]
        return []

    def told(self, deletes: Sequence[OwedDelete]) -> None:
        for each in deletes:
            owed = self._deletes[each.address]
            hashes = owed.get((each.namespace_id, each.part), {})
            if each.chunk_hash in hashes:
                del hashes[each.chunk_hash]
                self.deletes -= 1
                self.changed(each, False)
                if not hashes:
                    del owed[each.namespace_id, each.part]

    def _add(self, record: Record) -> bool:
        return self._add_object(record) if isinstance(record, OwedObject) else self._add_delete(record)

    def _add_object(self, record: OwedObject) -> bool:
        if record.key in self._prompt_of:
            return True
        prompt = record.prompt
        home = self.home(prompt)
        if self._counts[home] >= self._objects_max:
            return False
        self._prompts[home].setdefault(prompt, {})[record.key] = None
        self._prompt_of[record.key] = prompt
        self._counts[home] += 1
        return True

    def _add_delete(self, record: OwedDelete) -> bool:
        owed = self._deletes.get(record.address)
        if owed is None:
            return False
        if record.chunk_hash == WHOLE_NAMESPACE:  # which comes to the same as all that is owed of it
            for part in [part for namespace_id, part in owed if namespace_id == record.namespace_id]:
                hashes = list(owed[record.namespace_id, part])
                self.told([OwedDelete(record.address, record.namespace_id, part, each) for each in hashes])
        elif WHOLE_NAMESPACE in owed.get((record.namespace_id, 0), {}):
            return True
        if record.chunk_hash not in owed.get((record.namespace_id, record.part), {}):
            if self.deletes >= DELETES_MAX:
                return False
            owed.setdefault((record.namespace_id, record.part), {})[record.chunk_hash] = None
            self.deletes += 1
        return True


def _told_nobody(record: Record, owed: bool) -> None:
    """Where nothing outlives the process."""
