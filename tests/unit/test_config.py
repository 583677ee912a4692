"""NodeConfig: where values come from, what they may be, and what a person is told when they may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.config import NodeConfig, load_config
from kvstore.errors import Code, ConfigError, KvStoreError


def problems(toml: Path | None = None, flags: dict[str, object] | None = None, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load_config(toml, flags or {}, environ)
    assert isinstance(raised.value, KvStoreError)
    assert raised.value.code is Code.CONFIG
    assert all("\n" not in problem for problem in raised.value.problems)
    return raised.value.problems


def test_defaults_need_nothing() -> None:
    config = load_config(None, {}, {})
    assert config == NodeConfig()
    assert config.listen_addresses == ("127.0.0.1:7070",)
    assert config.disk_path is None
    assert config.node_name


def test_the_strongest_source_wins(tmp_path: Path) -> None:
    toml = tmp_path / "node.toml"
    toml.write_text('node_id = "file"\nhost_capacity = "1GiB"\nlease_ms_max = 1\n')
    environ = {"KVSTORE_NODE_ID": "env", "KVSTORE_HOST_CAPACITY": "2GiB"}
    config = load_config(toml, {"node_id": "flag", "lease_ms_max": None}, environ)
    assert (config.node_id, config.host_capacity, config.lease_ms_max) == ("flag", 2 << 30, 1)


@pytest.mark.parametrize(
    ("given_size", "size_bytes"),
    [(1, 1), (4096, 4096), ("4096", 4096), ("4GiB", 4 << 30), ("512MB", 512_000_000), ("1.5 KiB", 1536)],
)
def test_sizes(given_size: object, size_bytes: int) -> None:
    assert load_config(None, {"host_capacity": given_size}, {}).host_capacity == size_bytes


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "lots", "-4GiB", "4 gigs", "", [1], 1 << 63])
def test_wrong_sizes_say_what_is_expected(wrong: object) -> None:
    (problem,) = problems(flags={"host_capacity": wrong})
    assert problem.startswith("flags: --host-capacity = ")


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    toml = tmp_path / "node.toml"
    toml.write_text('host_capcity = "1GiB"\n[tiers]\nx = 1\n')
    found = problems(toml, KVSTORE_DISK_PATHS="/tmp", KVSTORE_LISTN=":1")
    assert found[0] == f"{toml}: unknown key host_capcity; did you mean host_capacity?"
    assert found[1].startswith(f"{toml}: unknown key tiers; did you mean ")
    assert found[2] == "environment: unknown key KVSTORE_DISK_PATHS; did you mean KVSTORE_DISK_PATH?"
    assert found[3] == "environment: unknown key KVSTORE_LISTN; did you mean KVSTORE_LISTEN?"


@given(st.text(st.characters(categories=("Lu", "Ll", "Nd"), max_codepoint=127), min_size=1, max_size=20))
def test_every_unknown_key_gets_a_suggestion(key: str) -> None:
    if key.lower() not in NodeConfig.model_fields and not key.upper().endswith("PORT"):
        with pytest.raises(ConfigError, match="did you mean KVSTORE_"):
            load_config(None, {}, {f"KVSTORE_{key}": "x"})


def test_all_problems_are_told_at_once() -> None:
    found = problems(flags={"stream_idle_s": 0}, KVSTORE_LEASE_MS_MAX="-1", KVSTORE_LOG_LEVEL="loud")
    assert len(found) == 3
    assert any(line.startswith("environment: KVSTORE_LEASE_MS_MAX = '-1': ") for line in found)
    assert any("'debug', 'info', 'warning' or 'error'" in line for line in found)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:0", "[::1]:7070", "0.0.0.0:65535", "node.example:1", "unix:/run/kv.sock", "h:1,unix:/a, h:2"],
)
def test_addresses(address: str) -> None:
    assert NodeConfig(listen=address).listen == address


@pytest.mark.parametrize(
    "address", ["", "nowhere", ":7070", "h:65536", "h:", "::1:7070", "unix:relative", "unix:/" + "x" * 107, "h:1,"]
)
def test_wrong_addresses(address: str) -> None:
    (problem,) = problems(flags={"listen": address})
    assert problem.startswith("flags: --listen = ")


def test_metrics_are_served_on_tcp() -> None:
    assert problems(flags={"metrics_listen": "unix:/run/m.sock"})


def test_a_node_that_could_hold_nothing_is_an_error() -> None:
    assert "disk_path" in problems(flags={"host_capacity": 0})[0]
    assert "disk_capacity" in problems(flags={"disk_path": "/d", "disk_capacity": 0})[0]
    assert load_config(None, {"host_capacity": 0, "disk_path": "/d"}, {}).host_capacity == 0


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    assert "cannot be read" in problems(tmp_path / "missing.toml")[0]
    broken = tmp_path / "broken.toml"
    broken.write_text("listen = ")
    assert "not valid TOML" in problems(broken)[0]
    broken.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in problems(broken)[0]


def test_variables_of_a_kubernetes_service_called_kvstore_are_not_ours() -> None:
    links = {
        "KVSTORE_SERVICE_HOST": "10.96.0.7",
        "KVSTORE_SERVICE_PORT": "7070",
        "KVSTORE_SERVICE_PORT_GRPC": "7070",
        "KVSTORE_PORT": "tcp://10.96.0.7:7070",
        "KVSTORE_PORT_7070_TCP": "tcp://10.96.0.7:7070",
        "KVSTORE_PORT_7070_TCP_PROTO": "tcp",
        "KVSTORE_PORT_7070_TCP_PORT": "7070",
        "KVSTORE_PORT_7070_TCP_ADDR": "10.96.0.7",
        "KVSTORE_READ_SERVICE_HOST": "fd00::7",
    }
    assert load_config(None, {}, links) == NodeConfig()
    assert problems(KVSTORE_PORT="my.host:7070")


def test_our_variables_that_configure_no_node() -> None:
    assert load_config(None, {}, {"KVSTORE_TARGET": "h:1", "KVSTORE_STRICT": "1"}) == NodeConfig()
