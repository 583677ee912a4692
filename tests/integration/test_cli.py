"""The `kvstore` command as scripts and people meet it: exit codes, one-line errors, JSON that parses."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import kv_objects as kv
import pytest
from command import OK, PROBLEM, UNREACHABLE, USAGE, admin, admin_json, error_line, run
from node_process import KVSTORE, NodeProcess, clean_environment

from kvstore import __version__

LAYOUT = kv.small_layout()


def test_version_and_help() -> None:
    assert run("--version").stdout == f"kvstore {__version__}\n"
    admin_commands = ("stat", "ls", "show", "verify", "evict", "pin", "unpin", "top", "doctor")
    for command in ([], ["serve"], ["admin"], *(["admin", name] for name in admin_commands)):
        done = run(*command, "--help")
        assert (done.returncode, done.stderr) == (OK, "")
        assert "Usage: kvstore" in done.stdout


def test_help_loads_no_server() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", KVSTORE, "--help"],
        capture_output=True, text=True, timeout=60, check=True, env=clean_environment(),
    )  # fmt: skip
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "kvstore.cli.app" in loaded
    assert loaded.isdisjoint({"grpc", "pydantic", "numpy", "torch", "kvstore.config"})


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["serve", "--host-capcity", "1GiB"], "--host-capcity"),
        (["frobnicate"], "frobnicate"),
        (["admin", "show"], "HASH"),
        (["admin", "show", "xyz"], "xyz"),
        (["admin", "stat", "--deadline", "soon"], "--deadline"),
        (["admin", "evict"], "--bytes"),
        (["admin", "evict", "--bytes", "some"], "some"),
        (["admin", "pin"], "HASH"),
        (["admin", "pin", "ab", "--for", "soon"], "soon"),
        (["admin", "pin", "ab", "--for", "1h", "--hard"], "--hard"),
        (["admin", "unpin"], "--all"),
        (["admin", "top", "--interval", "0"], "--interval"),
        (["admin", "doctor", "--only", "weather"], "weather"),
        (["serve", "--host-capacity", "lots"], "--host-capacity"),
        (["serve", "--log-level", "loud"], "--log-level"),
        (["serve", "--listen", "nowhere"], "--listen"),
        (["serve", "--config", "/nonexistent.toml"], "/nonexistent.toml"),
    ],
)
def test_wrong_usage_is_one_line_naming_the_culprit(arguments: list[str], names: str) -> None:
    assert names in error_line(run(*arguments), USAGE)


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('host_capcity = "1GiB"\n')
    assert "did you mean host_capacity?" in error_line(run("serve", "--config", str(config)), USAGE)
    assert "did you mean KVSTORE_DISK_PATH?" in error_line(run("serve", KVSTORE_DISK_PTH="/tmp"), USAGE)


def test_flags_win_over_environment_over_file(tmp_path: Path, start_node: Callable[..., NodeProcess]) -> None:
    config = tmp_path / "node.toml"
    config.write_text('host_capacity = "48MiB"\nnode_id = "from-file"\n')
    node = start_node("--config", str(config), "--node-id", "from-flag")
    stat = admin_json(node, "stat")
    assert stat["node_id"] == "from-flag"
    assert stat["tiers"][0] == {"tier": "host", "objects": 0, "used_bytes": 0, "capacity_bytes": 48 << 20}


def test_the_ready_line(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    socket_path = tmp_path / "kv.sock"
    node = start_node("--node-id", "n1", "--metrics-listen", "127.0.0.1:0", listen=f"127.0.0.1:0,unix:{socket_path}")
    assert node.ready["event"] == "ready"
    assert node.ready["node_id"] == "n1"
    assert node.ready["pid"] == node.process.pid
    assert node.ready["addresses"][1] == f"unix:{socket_path}"
    assert "kvstore_rpcs_in_flight 0.0" in node.metrics()
    for address in node.ready["addresses"]:
        assert run("admin", "stat", "--target", address).returncode == OK
    assert node.stop() == OK
    assert not socket_path.exists()


def test_a_taken_port_is_one_line(node: NodeProcess) -> None:
    line = error_line(run("serve", "--listen", node.address, "--log-level", "error"), USAGE)
    assert "in use" in line
    assert "--listen" in line


def test_a_taken_metrics_port_is_one_line() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("serve", "--listen", "127.0.0.1:0", "--metrics-listen", address, "--log-level", "error")
    assert "--metrics-listen" in error_line(done, USAGE)


def test_a_disk_path_that_cannot_be_used_is_one_line(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    start_node("--disk-path", str(tmp_path / "disk"))
    quiet = ("serve", "--listen", "127.0.0.1:0", "--log-level", "error")
    taken = run(*quiet, "--disk-path", str(tmp_path / "disk"))
    assert "in use by another node" in error_line(taken, USAGE)
    (tmp_path / "file").write_text("precious")
    blocked = run(*quiet, "--disk-path", str(tmp_path / "file"))
    assert "choose a directory" in error_line(blocked, USAGE)
    assert (tmp_path / "file").read_text() == "precious"


def test_unix_sockets(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    path = tmp_path / "kv.sock"
    first = start_node(listen=f"unix:{path}")
    taken = run("serve", "--listen", f"unix:{path}", "--log-level", "error")
    assert "another process answers there" in error_line(taken, USAGE)
    first.kill()
    assert path.exists(), "a killed node leaves its socket"
    second = start_node(listen=f"unix:{path}")
    assert run("admin", "stat", KVSTORE_TARGET=second.address).returncode == OK

    (tmp_path / "file").write_text("precious")
    blocked = run("serve", "--listen", f"unix:{tmp_path}/file", "--log-level", "error")
    assert "another kind" in error_line(blocked, USAGE)
    assert (tmp_path / "file").read_text() == "precious"
    missing = run("serve", "--listen", f"unix:{tmp_path}/missing/kv.sock", "--log-level", "error")
    assert "create" in error_line(missing, USAGE)


def test_a_node_that_is_down_is_exit_code_3() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        slow = run("admin", "stat", "--target", f"127.0.0.1:{port}", "--deadline", "0.3")
    error_line(slow, UNREACHABLE)
    calls = (["stat"], ["ls"], ["show", "ab"], ["verify"], ["evict", "--all"], ["pin", "ab"], ["unpin", "--all"])
    for command in (*calls, ["top", "--once"]):
        line = error_line(run("admin", *command, "--target", f"127.0.0.1:{port}"), UNREACHABLE)
        assert f"127.0.0.1:{port}" in line


@pytest.fixture
def stored(node: NodeProcess) -> list[kv.StoredChunk]:
    chunks = kv.chunks(LAYOUT, 4, seed=1)
    kv.put(node.store, LAYOUT, chunks, durable=True)
    return chunks


def test_stat(node: NodeProcess, stored: list[kv.StoredChunk]) -> None:
    stat = admin_json(node, "stat")
    assert (stat["objects"], stat["namespaces"], stat["version"]) == (4, 1, __version__)
    assert {tier["tier"]: tier["objects"] for tier in stat["tiers"]} == {"host": 4, "disk": 4}
    table = admin(node, "stat").stdout
    assert "4 in 1 namespaces" in table
    assert "disk" in table


def test_ls(node: NodeProcess, stored: list[kv.StoredChunk]) -> None:
    everything = admin_json(node, "ls")
    assert {entry["chunk_hash"] for entry in everything["objects"]} == {chunk.hash.hex() for chunk in stored}
    assert everything["more"] is False
    odd = stored[1].hash.hex()[:5]
    assert [entry["chunk_hash"] for entry in admin_json(node, "ls", odd)["objects"]] == [stored[1].hash.hex()]
    few = admin_json(node, "ls", "--limit", "2")
    assert (len(few["objects"]), few["more"]) == (2, True)
    namespace = LAYOUT.namespace_id.hex()
    for prefix in (namespace, namespace[:7]):
        assert len(admin_json(node, "ls", "--namespace", prefix)["objects"]) == 4
    assert admin_json(node, "ls", "--namespace", "00" * 32)["objects"] == []
    table = admin(node, "ls").stdout
    assert all(chunk.hash.hex()[:12] in table for chunk in stored)
    assert "raw" in table


def test_show(node: NodeProcess, stored: list[kv.StoredChunk]) -> None:
    shown = admin_json(node, "show", stored[2].hash.hex()[:9])["objects"][0]
    assert shown["chunk_hash"] == stored[2].hash.hex()
    assert shown["parent_hash"] == stored[1].hash.hex()
    assert (shown["tokens"], shown["first_position"], shown["quality"]) == (16, 32, "raw")
    assert sorted(shown["tiers"]) == ["disk", "host"]
    assert stored[2].hash.hex() in admin(node, "show", stored[2].hash.hex()).stdout
    absent = admin(node, "show", "00" * 32)
    assert "nothing stored" in error_line(absent, PROBLEM)
    assert admin_json(node, "show", "00" * 32, code=PROBLEM) == {"objects": []}


def test_verify_reports_damage_by_its_exit_code(
    node: NodeProcess, stored: list[kv.StoredChunk], tmp_path: Path
) -> None:
    assert admin_json(node, "verify") == {"checked": 4, "total": 4, "damaged": []}
    assert admin_json(node, "verify", stored[0].hash.hex()[:10])["checked"] == 1
    admin_json(node, "evict", "--tier", "host", "--all")
    damage(tmp_path / "disk", stored[3].blob)
    report = admin_json(node, "verify", code=PROBLEM)
    assert [problem["chunk_hash"] for problem in report["damaged"]] == [stored[3].hash.hex()]
    assert report["damaged"][0]["problem"]
    again = admin(node, "verify")
    assert again.returncode == OK, "the damaged object was dropped"
    assert "3 objects checked, 0 damaged" in again.stdout


def damage(folder: Path, blob: bytes) -> None:
    """Flips one payload bit of `blob` wherever the disk tier keeps it."""
    needle = blob[-64:]
    for path in (path for path in folder.rglob("*") if path.is_file()):
        data = bytearray(path.read_bytes())
        at = data.find(needle)
        if at >= 0:
            data[at + 32] ^= 0x10
            with path.open("r+b") as file:
                file.write(data)
            return
    raise AssertionError("the object is not on disk")


def test_evict(node: NodeProcess, stored: list[kv.StoredChunk]) -> None:
    assert admin_json(node, "evict", "--tier", "host", "--bytes", "1")["objects"] == 1
    assert admin_json(node, "evict", stored[3].hash.hex()[:10])["objects"] == 1
    assert admin(node, "show", stored[3].hash.hex()).returncode == PROBLEM
    assert admin(node, "evict", "--bytes", "1TiB").returncode == PROBLEM, "less was freed than asked for"
    assert admin_json(node, "stat")["objects"] == 0
    assert "unknown tier" in error_line(admin(node, "evict", "--tier", "tape", "--all"), USAGE)


def test_an_ambiguous_prefix_is_refused(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 17, seed=2)  # 17 hashes: some two share their first digit
    kv.put(node.store, LAYOUT, chunks)
    digits = [chunk.hash.hex()[0] for chunk in chunks]
    shared = next(digit for digit in digits if digits.count(digit) > 1)
    assert "more digits" in error_line(admin(node, "evict", shared), USAGE)
    assert admin_json(node, "stat")["objects"] == 17
