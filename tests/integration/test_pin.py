"""`kvstore admin pin` and `unpin` against a node that has to evict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import kv_objects as kv
import pytest
from command import OK, PROBLEM, admin, admin_json, error_line
from node_process import NodeProcess

from kvstore.cli.outcome import CommandFailed
from kvstore.cli.pin import seconds_of

LAYOUT = kv.small_layout()


@pytest.fixture
def stored(node: NodeProcess) -> list[kv.StoredChunk]:
    chunks = kv.chunks(LAYOUT, 4, seed=1)
    kv.put(node.store, LAYOUT, chunks, durable=True)
    return chunks


def pinned(node: NodeProcess) -> set[str]:
    return {entry["chunk_hash"] for entry in admin_json(node, "ls")["objects"] if entry["pinned"]}


@pytest.mark.parametrize("how", [["--for", "1h"], ["--hard"], []])
def test_what_is_pinned_survives_an_eviction_of_everything(
    node: NodeProcess, stored: list[kv.StoredChunk], how: list[str]
) -> None:
    kept = stored[2].hash.hex()
    answer = admin_json(node, "pin", kept[:10], *how)
    assert (answer["objects"], answer["refused"]) == (1, 0)
    assert answer["seconds"] == (0 if how == ["--hard"] else 3600)
    assert pinned(node) == {kept}
    assert "pinned" in admin(node, "ls").stdout
    assert admin_json(node, "show", kept)["objects"][0]["pinned"] is True
    assert admin_json(node, "stat")["pinned_bytes"] == len(stored[2].blob)
    admin_json(node, "evict", "--all")
    assert {entry["chunk_hash"] for entry in admin_json(node, "ls")["objects"]} >= {kept}
    assert admin_json(node, "unpin", kept) == {"objects": 1}
    assert pinned(node) == set()
    admin_json(node, "evict", "--all")
    assert admin_json(node, "stat")["objects"] == 0


def test_unpin_all_and_what_was_not_pinned(node: NodeProcess, stored: list[kv.StoredChunk]) -> None:
    hashes = [chunk.hash.hex() for chunk in stored]
    assert "2 objects pinned, for 5400 s" in admin(node, "pin", *hashes[:2], "--for", "1.5h").stdout
    assert admin_json(node, "pin", hashes[2], "--hard")["objects"] == 1
    assert admin(node, "unpin", hashes[3]).returncode == PROBLEM
    assert admin_json(node, "unpin", "--all") == {"objects": 3}
    assert admin(node, "unpin", "--all").returncode == OK, "nothing left to do is no problem"


def test_a_hard_pin_survives_a_restart(tmp_path: Path, start_node: Callable[..., NodeProcess]) -> None:
    disk = ("--disk-path", str(tmp_path / "disk"))
    first = start_node(*disk)
    chunks = kv.chunks(LAYOUT, 2, seed=1)
    kv.put(first.store, LAYOUT, chunks, durable=True)
    admin_json(first, "pin", chunks[1].hash.hex(), "--hard")
    assert first.stop() == OK
    assert pinned(start_node(*disk)) == {chunks[1].hash.hex()}


def test_beyond_the_budget_is_said(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--hard-pin-share", "0", "--soft-pin-share", "0")
    chunks = kv.chunks(LAYOUT, 1, seed=1)
    kv.put(node.store, LAYOUT, chunks)
    for how, key in (([], "soft_pin_share"), (["--hard"], "hard_pin_share")):
        assert key in error_line(admin(node, "pin", chunks[0].hash.hex(), *how), PROBLEM)
    assert "nothing stored" in error_line(admin(node, "pin", "00" * 32), PROBLEM)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604_800)])
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("wrong", ["", "1", "h", "-1h", "1w", "0s", "0.1s", "100000d", "1h30m", "nan s"])
def test_wrong_times(wrong: str) -> None:
    with pytest.raises(CommandFailed, match="--for"):
        seconds_of(wrong)
