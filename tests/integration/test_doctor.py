"""`kvstore admin doctor` on machines, disks and Redis servers that are well, and on such as are not."""

from __future__ import annotations

import json
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import kv_objects as kv
import pytest
from command import OK, PROBLEM, USAGE, error_line, run
from node_process import KVSTORE, NodeProcess, clean_environment
from redis_process import RedisProcess, running

import kvstore_codec as codec
from kvstore.cli import doctor_codec, doctor_machine, doctor_network
from kvstore.cli.doctor import CHECKS
from kvstore.cli.doctor_codec import check_codec
from kvstore.cli.doctor_finding import Level, Subject
from kvstore.config import NodeConfig
from kvstore_codec.native import NativeCoder
from kvstore_codec.reference.coder import ReferenceCoder

LAYOUT = kv.small_layout()
SUBJECT = Subject(NodeConfig(), None, 10.0)


def doctor(*arguments: str, code: int = OK, **variables: str) -> list[dict[str, str]]:
    done = run("admin", "doctor", "--json", *arguments, **variables)
    assert done.returncode == code, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["ok"] is (code == OK)
    findings: list[dict[str, str]] = report["findings"]
    for finding in findings:
        assert bool(finding["fix"]) == (finding["level"] != "ok"), finding
        assert "\n" not in finding["found"] + finding["fix"]
    return findings


def the(findings: list[dict[str, str]], level: str, words: str) -> dict[str, str]:
    """The one finding of this level that says so."""
    (found,) = [each for each in findings if each["level"] == level and words in each["found"] + each["fix"]]
    return found


@contextmanager
def redis_server(folder: Path, *options: str, password: str = "") -> Iterator[RedisProcess]:
    server = RedisProcess(folder, *options, password=password)
    with running(server):
        yield server


def test_all_is_well(tmp_path: Path, start_node: Callable[..., NodeProcess]) -> None:
    """Before the node starts, and while it runs."""
    config = tmp_path / "node.toml"
    with redis_server(tmp_path / "redis", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru") as redis:
        config.write_text(
            f'listen = "unix:{tmp_path}/kv.sock"\nhost_capacity = "64MiB"\ndisk_path = "{tmp_path}/disk"\n'
            f'disk_capacity = "64MiB"\nredis_url = "{redis.url}"\nredis_timeout_ms = 5000\n'
        )
        before = doctor("--config", str(config))
        assert [each["check"] for each in before] == sorted(
            (each["check"] for each in before), key=list(CHECKS).index
        )  # fmt: skip
        assert {each["check"] for each in before} == CHECKS.keys() - {"node"}
        assert not (tmp_path / "disk").exists(), "it changes nothing"
        assert redis.command("DBSIZE") == 0
        node = start_node("--config", str(config), listen=f"unix:{tmp_path}/kv.sock")
        kv.put(node.store, LAYOUT, kv.chunks(LAYOUT, 4, seed=1), durable=True)
        during = doctor("--config", str(config), "--target", node.address)
    the(before, "ok", "is free")
    the(during, "ok", "runs there")
    the(during, "ok", "4 objects, answers in")
    the(during, "ok", "is within")
    the(during, "ok", "held by the running node")
    assert "0 B taken" not in the(during, "ok", "taken by objects")["found"]
    assert list((tmp_path / "disk").glob(".kvstore-doctor*")) == []
    for findings in (before, during):
        the(findings, "ok", "raw, lossless, high, medium, low")
        the(findings, "ok", "SET, GETRANGE")
        # Whether the clock is synchronised, and how quick the disk is, is the machine's affair.
        assert {each["check"] for each in findings if each["level"] != "ok"} <= {"clock", "disk"}


def test_lines_for_people() -> None:
    done = run("admin", "doctor", "--only", "version", "--only", "disk", COLUMNS="20")
    assert done.returncode == OK
    version, disk = done.stdout.splitlines()
    assert version.startswith("ok    version   kvstore ")
    assert disk.startswith("ok    disk      no disk_path")


def test_wrong_usage_and_configuration(tmp_path: Path) -> None:
    assert "must be one of" in error_line(run("admin", "doctor", "--only", "weather"), USAGE)
    config = tmp_path / "node.toml"
    config.write_text('host_capcity = "1GiB"\n')
    assert "did you mean host_capacity?" in error_line(run("admin", "doctor", "--config", str(config)), USAGE)


def test_disks_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        finding = the(doctor("--only", "disk", code=PROBLEM, KVSTORE_DISK_PATH=str(path)), "fail", "not a directory")
        assert "choose a directory" in finding["fix"]
    proc = doctor("--only", "disk", code=PROBLEM, KVSTORE_DISK_PATH="/proc/kvstore")
    assert "choose another" in the(proc, "fail", "/proc/kvstore")["fix"]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_disk_with_less_room_than_configured(tmp_path: Path) -> None:
    more = str(2 * shutil.disk_usage(tmp_path).total)
    findings = doctor("--only", "disk", code=PROBLEM, KVSTORE_DISK_PATH=str(tmp_path), KVSTORE_DISK_CAPACITY=more)
    assert "lower disk_capacity" in the(findings, "fail", "free")["fix"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_a_disk_that_forgets() -> None:
    findings = doctor("--only", "disk", KVSTORE_DISK_PATH="/dev/shm/kvstore-doctor-test", KVSTORE_DISK_CAPACITY="1MiB")
    the(findings, "warn", "tmpfs")


def test_more_memory_than_there_is() -> None:
    findings = doctor("--only", "memory", code=PROBLEM, KVSTORE_HOST_CAPACITY="1000TiB")
    assert "lower host_capacity" in the(findings, "fail", "host_capacity")["fix"]


def test_huge_pages_can_be_had_exactly_where_a_node_starts_with_them() -> None:
    settings = {"KVSTORE_HUGE_PAGES": "true", "KVSTORE_LISTEN": "127.0.0.1:0"}
    done = run("admin", "doctor", "--only", "memory", **settings)
    node = subprocess.Popen([KVSTORE, "serve"], stdout=subprocess.PIPE, env=clean_environment(**settings))
    assert node.stdout is not None
    ready = node.stdout.readline()
    node.kill()
    node.communicate()
    assert (done.returncode == OK) == bool(ready)
    assert ("huge_pages can be had" in done.stdout) == bool(ready)


def test_few_open_files() -> None:
    done = subprocess.run(
        [KVSTORE, "admin", "doctor", "--json", "--only", "files"], capture_output=True, check=True, text=True,
        env=clean_environment(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )  # fmt: skip
    assert "ulimit" in the(json.loads(done.stdout)["findings"], "warn", "256")["fix"]


def test_addresses_that_are_taken_or_not_ours(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        findings = doctor(
            "--only", "listen", code=PROBLEM, KVSTORE_LISTEN=f"{address},203.0.113.7:1,unix:/nowhere/kv.sock",
            KVSTORE_METRICS_LISTEN=address,
        )  # fmt: skip
    assert [each["level"] for each in findings] == ["fail"] * 4
    assert "choose another listen" in findings[0]["fix"]
    assert "an address of this machine" in findings[1]["fix"]
    assert "create it" in findings[2]["fix"]
    assert "choose another metrics_listen" in findings[3]["fix"]
    (tmp_path / "kv.sock").write_text("precious")
    blocked = doctor("--only", "listen", code=PROBLEM, KVSTORE_LISTEN=f"unix:{tmp_path}/kv.sock")
    assert "another kind" in blocked[0]["found"]


def test_a_node_that_is_away() -> None:
    findings = doctor("--only", "node", "--target", "127.0.0.1:1", code=PROBLEM)
    assert "start it" in the(findings, "fail", "cannot be reached")["fix"]


def test_a_node_that_has_met_damage(node: NodeProcess) -> None:
    assert [each["level"] for each in doctor("--only", "node", KVSTORE_LISTEN=node.address)] == ["ok"]
    chunk = kv.chunks(LAYOUT, 1, seed=1)[0]
    kv.put(node.store, LAYOUT, [kv.StoredChunk(chunk.ref, chunk.blob[:-1] + bytes([chunk.blob[-1] ^ 1]))])
    finding = the(doctor("--only", "node", "--target", node.address), "warn", "since its start")
    assert "integrity_failures.put" in finding["found"]


def test_a_node_of_another_version(node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_network, "__version__", "0.0.0")
    subject = Subject(NodeConfig(listen=node.address), node.address, 10.0)
    for check in (doctor_network.check_node, doctor_network.check_listen):
        (finding,) = check(subject)
        assert finding.level is Level.WARN
        assert "of 0.0.0" in finding.found


def test_a_clock_that_is_off(node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = doctor_machine._now_s
    monkeypatch.setattr(doctor_machine, "_now_s", lambda: now_s() + 3600.0)
    _, finding = doctor_machine.check_clock(Subject(NodeConfig(), node.address, 10.0))
    assert finding.level is Level.WARN
    assert re.search(r"is 3(599|60\d)\.\d s off ours", finding.found)
    assert "NTP" in finding.fix


def test_the_clocks_of_upstream_nodes_are_compared_too(node: NodeProcess) -> None:
    upstream = f"{node.address},127.0.0.1:1"
    _, near, away = doctor_machine.check_clock(Subject(NodeConfig(upstream=upstream), None, 10.0))
    assert (near.level, away.level) == (Level.OK, Level.WARN)
    assert f"the clock of {node.address} is within" in near.found
    assert "127.0.0.1:1" in away.found


def test_redis_that_is_away() -> None:
    findings = doctor("--only", "redis", code=PROBLEM, KVSTORE_REDIS_URL="redis://127.0.0.1:1")
    assert {each["level"] for each in findings} == {"fail"}
    assert "redis_url" in findings[0]["fix"]


def test_redis_that_would_refuse_or_forget_wrongly(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as redis:
        url: dict[str, Any] = {"KVSTORE_REDIS_URL": redis.url, "KVSTORE_REDIS_TIMEOUT_MS": "5000"}
        assert "set maxmemory" in the(doctor("--only", "redis", **url), "warn", "maxmemory none")["fix"]
        redis.command("CONFIG", "SET", "maxmemory", "64mb")
        assert "allkeys-lru" in the(doctor("--only", "redis", **url), "warn", "noeviction")["fix"]
        redis.command("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
        assert {each["level"] for each in doctor("--only", "redis", **url)} == {"ok"}
        assert (
            "redis_ttl_s" in the(doctor("--only", "redis", KVSTORE_REDIS_TTL_S="0", **url), "warn", "volatile")["fix"]
        )
        redis.pause()
        slow = doctor("--only", "redis", code=PROBLEM, **{**url, "KVSTORE_REDIS_TIMEOUT_MS": "100"})
        assert "redis_timeout_ms" in slow[0]["fix"]
        redis.resume()


def test_redis_that_does_not_let_us(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", password="secret") as redis:
        wrong = redis.url.replace("secret", "guess")
        findings = doctor("--only", "redis", code=PROBLEM, KVSTORE_REDIS_URL=wrong)
        assert "redis_password_file" in findings[0]["fix"]
        assert "guess" not in json.dumps(findings)
        rules = ("on", ">pass", "~kvstore:*", "+@all", "-eval")
        redis.command("ACL", "SETUSER", "node", *rules)
        limited = redis.url.replace(":secret@", "node:pass@")
        findings = doctor("--only", "redis", code=PROBLEM, KVSTORE_REDIS_URL=limited, KVSTORE_REDIS_TIMEOUT_MS="5000")
        assert "EVAL" in the(findings, "fail", "allow this user")["fix"]
        reading: dict[str, Any] = {
            "KVSTORE_REDIS_URL": limited,
            "KVSTORE_REDIS_WRITE": "off",
            "KVSTORE_REDIS_TIMEOUT_MS": "5000",
        }
        the(doctor("--only", "redis", **reading), "ok", "GETRANGE, STRLEN work")


def test_a_cluster_that_is_not_said_to_be_one(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", "--cluster-enabled", "yes") as redis:
        findings = doctor("--only", "redis", code=PROBLEM, KVSTORE_REDIS_URL=redis.url, KVSTORE_REDIS_TIMEOUT_MS="5000")
    assert "redis_cluster = true" in the(findings, "fail", ", cluster,")["fix"]


class _Miscompiled(ReferenceCoder):
    """What a build would do that gets a byte wrong."""

    def encode_lossless(self, *arguments: Any, **options: Any) -> list[bytes]:
        return [bytes([payload[0] ^ 1]) + payload[1:] for payload in super().encode_lossless(*arguments, **options)]


def test_a_codec_that_is_wrong_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def coder_of(isa: str) -> Any:
        return _Miscompiled() if isa == "scalar" else NativeCoder(isa)

    monkeypatch.setattr(doctor_codec, "NativeCoder", coder_of)
    (finding,) = check_codec(SUBJECT)
    assert (finding.level, finding.found) == (Level.FAIL, "scalar encodes lossless differently from the reference")


def test_a_codec_that_overlooks_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "verify", lambda blob: None)
    findings = list(check_codec(SUBJECT))
    assert len(findings) == len(codec.Quality)
    assert all("passes for whole" in finding.found for finding in findings)
