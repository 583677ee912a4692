"""Rendezvous placement: everyone agrees, loads are even, and only what must move moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_cluster.placement import rank

names = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True)
keys = st.binary(max_size=64)


@given(names, keys, st.randoms(use_true_random=False))
def test_the_order_depends_on_the_set_alone(nodes: list[str], key: bytes, random: object) -> None:
    shuffled = list(nodes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert rank(shuffled, key) == rank([*nodes, *nodes], key)
    assert sorted(rank(nodes, key)) == sorted(nodes)


@given(names, keys)
def test_a_node_that_leaves_moves_nothing_else(nodes: list[str], key: bytes) -> None:
    ranked = rank(nodes, key)
    for gone in nodes:
        assert rank([node for node in nodes if node != gone], key) == [node for node in ranked if node != gone]


@given(names, st.text(min_size=1, max_size=12), keys)
def test_a_node_that_comes_takes_keys_or_leaves_them(nodes: list[str], new: str, key: bytes) -> None:
    assert rank([*nodes, new], key)[0] in (rank(nodes, key)[0], new)


def test_names_and_keys_do_not_run_into_each_other() -> None:
    keys_of_one = [rank(["ab", "a", "b"], key) for key in (b"", b"c", b"bc", b"abc")]
    assert len(set(map(tuple, keys_of_one))) > 1


def test_every_node_gets_its_share() -> None:
    nodes = [f"node-{index}:7070" for index in range(5)]
    first = [rank(nodes, number.to_bytes(4, "little"))[0] for number in range(5000)]
    shares = [first.count(node) / len(first) for node in nodes]
    assert all(0.17 < share < 0.23 for share in shares), shares  # 1/5, and five standard deviations


GOLDEN = {b"": "3102", b"prefix": "1302", bytes(64): "2310", bytes(range(64)): "1023", b"\xff" * 32: "3120"}


@pytest.mark.parametrize(("key", "ranked"), GOLDEN.items(), ids=GOLDEN.values())
def test_ranks_do_not_change_between_versions(key: bytes, ranked: str) -> None:
    """Clients of different versions share nodes: a changed rank loses what the others stored."""
    nodes = ["10.0.0.1:7070", "10.0.0.2:7070", "cache-0.cache.svc:7070", "unix:/run/kvstore.sock"]
    assert rank(nodes, key) == [nodes[int(digit)] for digit in ranked]
