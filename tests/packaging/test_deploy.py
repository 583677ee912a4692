"""deploy/: what the Compose file and the Dockerfile start, started here as processes; what Prometheus is told, parsed.

No container engine is needed: the files' commands, environments, health checks and limits are used as they are, but for
host names, ports and paths, which are this machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import kv_objects as kv
import promql_parser
import pytest
import yaml
from node_process import clean_environment
from polling import wait_until
from pydantic import ByteSize, TypeAdapter
from redis_process import free_ports

from kvstore.config import NodeConfig, load_config
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, FramedStoreStub

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
COMPOSE = DEPLOY / "docker-compose.yml"
DOCKERFILES = {name: (DEPLOY / name).read_text() for name in ("Dockerfile", "Dockerfile.vllm")}
DOCKERFILE = DOCKERFILES["Dockerfile"]
BIN = Path(sys.executable).parent
LAYOUT = kv.small_layout()
ROUTER = Path("examples/vllm/router.py")
REST_BYTES = 512 << 20  # of a node, beside its objects


def compose() -> dict[str, Any]:
    """Interpolated as Compose does it where the environment sets nothing."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())
    assert "${" not in text, "every variable has a default"
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def instruction(name: str) -> list[str]:
    """The words of the last ENTRYPOINT, CMD or HEALTHCHECK of the Dockerfile, in its exec form."""
    words: list[str] = json.loads(
        re.findall(rf"^ *{name} .*?(\[.*\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)[-1]
    )
    return words


NODE, REDIS, SIDECAR = (compose()["services"][name] for name in ("node", "redis", "sidecar"))


def config_of(service: dict[str, Any]) -> NodeConfig:
    return load_config(None, {}, service["environment"])


# The files as their tools read them.


def test_the_compose_file_follows_the_specification() -> None:
    check([BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE])


def test_the_schema_would_find_a_mistake(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace_time"))
    with pytest.raises(AssertionError, match="stop_grace_time"):
        check([BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", wrong])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_dockerfile_is_clean(name: str) -> None:
    check([BIN / "hadolint", DEPLOY / name])


def test_files_that_are_mounted_exist() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose()["volumes"], volume


@pytest.mark.parametrize(("name", "beside"), [("Dockerfile", set()), ("Dockerfile.vllm", {str(ROUTER)})])
def test_the_build_copies_all_that_the_wheel_is_made_of(name: str, beside: set[str]) -> None:
    words = re.findall(r"^COPY (.*)", DOCKERFILES[name], re.MULTILINE)
    copied = {source for line in words for source in line.split()[:-1]}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    build = project["tool"]["scikit-build"]
    sources = (*build["wheel"]["packages"], build["cmake"]["source-dir"])
    needed = {
        "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"],
        *(path.split("/")[0] for path in sources),
    }  # fmt: skip
    assert needed | beside == copied
    assert all((REPOSITORY / source).exists() for source in copied)
    kept = set(re.findall(r"^!(.*)", (DEPLOY / f"{name}.dockerignore").read_text(), re.MULTILINE))
    assert kept == copied


# What they say about resources.


@pytest.mark.parametrize("service", [NODE, SIDECAR], ids=["node", "sidecar"])
def test_the_limits_leave_room_for_what_a_node_is_told_to_hold(service: dict[str, Any]) -> None:
    config = config_of(service)
    needed = config.host_capacity + config.host_capacity // 16 + config.staged_bytes_max + REST_BYTES
    assert int(TypeAdapter(ByteSize).validate_python(service["mem_limit"].replace("g", "GiB"))) >= needed


def test_what_else_the_node_and_redis_are_given() -> None:
    config = config_of(NODE)
    redis_max = REDIS["command"][REDIS["command"].index("--maxmemory") + 1].removesuffix("gb")
    assert int(REDIS["mem_limit"].removesuffix("m")) << 20 > int(redis_max) << 30
    assert seconds(NODE["stop_grace_period"]) > config.shutdown_grace_s
    assert config.disk_path is not None
    assert f"node-data:{config.disk_path}" in NODE["volumes"]
    assert f"VOLUME {config.disk_path}" in DOCKERFILE


def test_nothing_runs_as_root_or_is_published_beyond_this_machine() -> None:
    for text in DOCKERFILES.values():
        assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["10001:10001"]
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_image_and_compose_file_agree() -> None:
    assert instruction("CMD") == NODE["command"] == ["serve"]
    assert ["CMD", *instruction("HEALTHCHECK")] == NODE["healthcheck"]["test"]
    image = load_config(None, {}, dict(re.findall(r"(KVSTORE_\w+)=(\S+)", DOCKERFILE)))
    ours = config_of(NODE)
    for key in ("listen", "metrics_listen", "disk_path", "log_format"):
        assert getattr(image, key) == getattr(ours, key), key
    assert {port.rpartition(":")[2] for port in NODE["ports"]} == set(re.findall(r"EXPOSE (.*)", DOCKERFILE)[0].split())


def test_the_engines_talk_to_the_sidecar_and_the_router_to_the_engines() -> None:
    services = compose()["services"]
    listens = config_of(SIDECAR).listen.split(",")
    for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        engine = services[name]
        flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in engine["command"][3:])
        transfer = json.loads(flags["kv-transfer-config"])
        assert transfer["kv_role"] == role
        assert transfer["kv_load_failure_policy"] == "recompute"
        assert ConnectorConfig.from_extra(transfer["kv_connector_extra_config"]).address in listens
        assert set(SIDECAR["volumes"]) < set(engine["volumes"])
        assert f":{flags['port']}/health" in engine["healthcheck"]["test"][-1]
        assert f"http://{name}:{flags['port']}" in services["router"]["command"]
        assert flags["host"] == "0.0.0.0"  # inside the container
        assert set(engine["profiles"]) < set(SIDECAR["profiles"])
    copied = re.findall(rf"^COPY {ROUTER} (.*)", DOCKERFILES["Dockerfile.vllm"], re.MULTILINE)
    assert services["router"]["command"][1] == copied[0]


# The same commands and environments as processes.


@dataclass
class Stack:
    node: subprocess.Popen[bytes]
    redis: subprocess.Popen[bytes]
    environment: dict[str, str]
    node_port: int
    redis_port: int
    log: Path

    def healthy(self) -> bool:
        return run(NODE["healthcheck"]["test"][1:], self.environment).returncode == 0

    def redis_healthy(self) -> bool:
        command = [*REDIS["healthcheck"]["test"][1:-1], "-p", str(self.redis_port), REDIS["healthcheck"]["test"][-1]]
        return run(command, {}).stdout.strip() == b"PONG"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    node_port, metrics_port, redis_port = free_ports(3)
    here = {
        "0.0.0.0:7070": f"127.0.0.1:{node_port}", "0.0.0.0:9464": f"127.0.0.1:{metrics_port}",
        "/var/lib/kvstore": str(tmp_path / "disk"), "redis://redis:6379/0": f"redis://127.0.0.1:{redis_port}/0",
    }  # fmt: skip
    given = {key: here.get(value, value) for key, value in NODE["environment"].items()}
    assert set(here.values()) <= set(given.values()), "each is in the Compose file"
    environment = {**given, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with contextlib.ExitStack() as processes:
        with (tmp_path / "redis.log").open("wb") as log:
            redis = subprocess.Popen(
                [*REDIS["command"], "--port", str(redis_port), "--bind", "127.0.0.1", "--dir", str(tmp_path)],
                stdout=log,
            )
        processes.callback(end, redis)
        log_path = tmp_path / "node.log"
        with log_path.open("wb") as log:
            node = subprocess.Popen(
                [*instruction("ENTRYPOINT"), *NODE["command"]], stderr=log, env=clean_environment(**environment)
            )
        processes.callback(end, node)
        yield Stack(node, redis, environment, node_port, redis_port, log_path)


def test_the_stack_serves_survives_redis_and_stops_in_time(stack: Stack) -> None:
    wait_until(stack.redis_healthy, "Redis is healthy", deadline_s=30)
    wait_until(stack.healthy, "the node is healthy", deadline_s=seconds(NODE["healthcheck"]["start_period"]))
    with grpc.insecure_channel(f"127.0.0.1:{stack.node_port}", options=CHANNEL_OPTIONS) as channel:
        store = FramedStoreStub(channel)
        chunks = kv.chunks(LAYOUT, 3, seed=1)
        kv.put(store, LAYOUT, chunks, durable=True)
        hashes = [chunk.hash for chunk in chunks]
        assert kv.fetch(store, LAYOUT, hashes) == [chunk.blob for chunk in chunks]
        doctor = run(["kvstore", "admin", "doctor", "--only", "redis", "--only", "disk"], stack.environment)
        assert doctor.returncode == 0, doctor.stdout.decode()
        end(stack.redis)
        assert not stack.redis_healthy()
        assert stack.healthy(), "a node without Redis is a node"
        assert kv.lookup(store, LAYOUT, [bytes(32)]) == []
        assert kv.fetch(store, LAYOUT, hashes) == [chunk.blob for chunk in chunks]
    began_s = time.monotonic()
    stack.node.send_signal(signal.SIGTERM)
    assert stack.node.wait(seconds(NODE["stop_grace_period"])) == 0
    assert time.monotonic() - began_s < seconds(NODE["stop_grace_period"]) / 2
    assert not stack.healthy()
    lines = [json.loads(line) for line in stack.log.read_text().splitlines()]
    assert {line["node_id"] for line in lines} == {NODE["environment"]["KVSTORE_NODE_ID"]}
    assert any("redis" in line["event"] for line in lines if line["level"] == "warning")


def test_the_sidecar_asks_the_node_and_is_found_healthy(stack: Stack, tmp_path: Path) -> None:
    config = config_of(SIDECAR)
    assert config.upstream_seeds == (f"node:{config_of(NODE).listen.rpartition(':')[2]}",)
    assert f"127.0.0.1:7071:{config.listen.rpartition(':')[2]}" in SIDECAR["ports"]
    assert all(path.startswith("/var/lib/kvstore/") for path in (str(config.disk_path), config.listen[len("unix:") :]))
    assert SIDECAR["healthcheck"]["test"] == NODE["healthcheck"]["test"]
    environment = {
        **SIDECAR["environment"], "PATH": f"{BIN}:{os.environ['PATH']}", "KVSTORE_HOST_CAPACITY": "64MiB",
        "KVSTORE_UPSTREAM": f"127.0.0.1:{stack.node_port}", "KVSTORE_METRICS_LISTEN": "127.0.0.1:0",
        "KVSTORE_LISTEN": f"unix:{tmp_path}/sidecar.sock,127.0.0.1:0", "KVSTORE_DISK_PATH": str(tmp_path / "sidecar"),
    }  # fmt: skip
    wait_until(stack.healthy, "the node is healthy", deadline_s=seconds(NODE["healthcheck"]["start_period"]))
    with (tmp_path / "sidecar.log").open("wb") as log:
        sidecar = subprocess.Popen(
            [*instruction("ENTRYPOINT"), *SIDECAR["command"]], stdout=subprocess.DEVNULL, stderr=log,
            env=clean_environment(**environment),
        )  # fmt: skip
    try:
        check_health = SIDECAR["healthcheck"]["test"][1:]
        wait_until(lambda: run(check_health, environment).returncode == 0, "the sidecar is healthy", deadline_s=60)
        doctor = run(["kvstore", "admin", "doctor", "--only", "upstream"], environment)
        assert doctor.returncode == 0, doctor.stdout.decode()
    finally:
        end(sidecar)


# What Prometheus and Grafana are told.


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "node.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [expression.replace("$__rate_interval", "5m") for expression in expressions]


EXPRESSIONS = [*(rule["expr"] for rule in rules()), *dashboard_expressions()]


def documented() -> set[str]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (REPOSITORY / "docs" / "metrics.md").read_text(), re.MULTILINE)
    parts = ("_bucket", "_count", "_sum")
    return {f"{name}{part}" for name, kind in rows for part in (parts if kind == "histogram" else ("",))}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_parse_and_ask_for_metrics_that_there_are(expression: str) -> None:
    promql_parser.parse(expression)
    assert set(re.findall(r"\b(?:kvstore|process)_\w+", expression)) <= documented()


def test_alerts_are_those_of_the_document() -> None:
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    assert {rule["alert"] for rule in rules()} == set(re.findall(r"\*\*(Kvstore\w+)\*\*", text))
    for rule in rules():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]


def test_prometheus_scrapes_the_node_of_the_compose_file() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (scraped,) = config["scrape_configs"]
    _, _, port = NODE["environment"]["KVSTORE_METRICS_LISTEN"].rpartition(":")
    assert scraped["static_configs"] == [{"targets": [f"node:{port}"]}]
    assert scraped["job_name"] == "kvstore", "the alerts say so"
    assert config["rule_files"] == ["alerts.yml"]


def check(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, capture_output=True, timeout=60, check=False, env=clean_environment(**environment)
    )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))
