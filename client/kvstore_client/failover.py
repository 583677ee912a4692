"""Which node a call asks, and which next: the best for its key, and behind the others those that have been failing.

A node that hangs would cost each call whose keys it has a share of its time, before the next node is asked. With a
circuit for each node it costs a few calls that, and one a pause from then on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

from kvstore_client.circuit import Circuit
from kvstore_client.connection import Node
from kvstore_client.errors import DeadlineExceeded, KvClientError, ProtocolViolation, ServerFailed, Unavailable


class Failover:
    """Of so many `seeds`; of one alone nothing is judged. `changed` is told (node, "open" or "closed"). Any thread may
    call it, but for `turns`."""

    def __init__(self, seeds: int, changed: Callable[[str, str], None]) -> None:
        self._alone, self._changed = seeds == 1, changed
        self._circuits: dict[str, Circuit] = {}

    def turns(self, nodes: Sequence[Node]) -> Iterator[tuple[Node, int]]:
        """Each of `nodes` once, with the number of those that are to share the time that is left. What becomes of each
        that is asked is to be told: `answered`, `failed`."""
        circuits = [self._circuit(node) for node in nodes]
        failing: list[Node] = []
        for at, (node, circuit) in enumerate(zip(nodes, circuits, strict=True)):
            if self._alone or circuit.allow():
                yield node, 1 + sum(other.state == "closed" for other in circuits[at + 1 :])
            else:
                failing.append(node)
        for at, node in enumerate(failing):  # nobody else has answered
            yield node, len(failing) - at

    def is_well(self, node: Node) -> bool:
        return self._circuit(node).state == "closed"

    def answered(self, node: Node) -> None:
        if not self._alone and self._circuit(node).succeed():
            self._changed(node.address, "closed")

    def failed(self, node: Node, error: KvClientError) -> None:
        """A call that ended by `error`, which may say nothing against the node."""
        if not _is_of_node(error):
            self.answered(node)
        elif not self._alone and self._circuit(node).fail():
            self._changed(node.address, "open")

    def _circuit(self, node: Node) -> Circuit:
        if node.address not in self._circuits:
            self._circuits.setdefault(node.address, Circuit(time.monotonic, random.Random()))
        return self._circuits[node.address]


def _is_of_node(error: KvClientError) -> bool:
    """Whether the node is away or does not do what it should. A deadline without a node passed in our own hands."""
    if isinstance(error, DeadlineExceeded):
        return "node" in error.context
    return isinstance(error, Unavailable | ServerFailed | ProtocolViolation)
