"""The keys redis_*: what fits together, what a person is told, and that passwords are told nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis_tiers import Told

from kvstore.config import NodeConfig, load_config
from kvstore.errors import ConfigError
from kvstore.tiers.redis_open import open_redis
from kvstore.tiers.redis_url import RedisUrl, parse_redis_urls

SECRET = "hunter2secret"


def problem(**flags: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(None, flags, {})
    (found,) = raised.value.problems
    assert "\n" not in found
    return found


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("redis://h", RedisUrl("h", 6379, "", False, 0, None, None)),
        ("redis://h:1/3", RedisUrl("h", 1, "", False, 3, None, None)),
        ("rediss://u:p@h:0", RedisUrl("h", 0, "", True, 0, "u", "p")),
        ("redis://:p%40%2F%2C@[::1]:9", RedisUrl("::1", 9, "", False, 0, None, "p@/,")),
        ("unix:///run/redis.sock", RedisUrl("", 0, "/run/redis.sock", False, 0, None, None)),
    ],
)
def test_urls(url: str, parsed: RedisUrl) -> None:
    assert parse_redis_urls(url) == (parsed,)
    assert load_config(None, {"redis_url": url}, {}).redis_urls == (parsed,)


def test_several_urls_and_their_addresses() -> None:
    urls = load_config(None, {"redis_url": "redis://a:1, redis://[::2]:2", "redis_cluster": True}, {}).redis_urls
    assert [url.address for url in urls] == ["a:1", "[::2]:2"]


@pytest.mark.parametrize(
    "url",
    [
        "", "h:6379", "http://h", "redis://", "redis://h:x", "redis://h:65536", "redis://h/x", "redis://h/1/2",
        "redis://h?db=1", "redis://h#x", "unix://relative", "redis://h,", "redis://[::1", "redis://a:b:c",
    ],
)  # fmt: skip
def test_wrong_urls_name_the_form_and_not_the_value(url: str) -> None:
    found = problem(redis_url=url)
    assert found.startswith("flags: --redis-url = (not shown): ")
    assert "redis" in found.removeprefix("flags: --redis-url")


@pytest.mark.parametrize(
    "url", [f"http://:{SECRET}@h", f"redis://:{SECRET}@h:port", f"redis://u:{SECRET}@h?x=1", f"redis://:{SECRET}#@h"]
)
def test_a_password_is_not_repeated(url: str) -> None:
    assert SECRET not in problem(redis_url=url)
    assert SECRET not in problem(redis_url=[url])


def test_a_password_is_not_in_what_is_printed_of_a_configuration() -> None:
    config = load_config(None, {"redis_url": f"redis://:{SECRET}@h"}, {})
    assert config.redis_urls[0].password == SECRET
    assert SECRET not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()} {config.redis_urls}"


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ({"redis_cluster": True}, "without redis_url"),
        ({"redis_ca": "/ca"}, "without redis_url"),
        ({"redis_password_file": "/p"}, "without redis_url"),
        ({"redis_url": "redis://h", "redis_ca": "/ca"}, "rediss://"),
        ({"redis_url": "rediss://h", "redis_cert": "/c"}, "set both"),
        ({"redis_url": "rediss://h", "redis_key": "/k"}, "set both"),
        ({"redis_url": "redis://:p@h", "redis_password_file": "/p"}, "keep one"),
        ({"redis_url": "redis://h,redis://g"}, "redis_cluster"),
        ({"redis_url": "redis://h/1", "redis_cluster": True}, "redis://host:port"),
        ({"redis_url": "unix:///s", "redis_cluster": True}, "redis://host:port"),
        ({"redis_url": "redis://h,rediss://g", "redis_cluster": True}, "alike"),
        ({"redis_url": "redis://:a@h,redis://:b@g", "redis_cluster": True}, "alike"),
        ({"redis_prefix": "a:b"}, "pattern"),
        ({"redis_prefix": "*"}, "pattern"),
        ({"redis_timeout_ms": 0}, "greater"),
        ({"redis_ttl_s": -1}, "greater"),
        ({"redis_write": "maybe"}, "'off', 'behind' or 'through'"),
    ],
)
def test_what_does_not_fit_together_names_the_fix(flags: dict[str, Any], fix: str) -> None:
    assert fix in problem(**flags)


def opening(**flags: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        open_redis(load_config(None, flags, {}), Told())
    (found,) = raised.value.problems
    return found


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    assert "cannot be read" in opening(redis_url="redis://h", redis_password_file=str(tmp_path / "missing"))
    assert "is empty" in opening(redis_url="redis://h", redis_password_file=str(empty))
    assert "is not text" in opening(redis_url="redis://h", redis_password_file=str(binary))
    missing = opening(redis_url="rediss://h", redis_ca=str(tmp_path / "missing"))
    assert missing.startswith("redis_ca ")
    assert "PEM" in missing
    assert "PEM" in opening(redis_url="rediss://h", redis_ca=str(binary))
    wrong = opening(redis_url="rediss://h", redis_cert=str(binary), redis_key=str(binary))
    assert wrong.startswith("redis_cert ")


def test_without_a_url_there_is_no_tier() -> None:
    assert open_redis(NodeConfig(), Told()) is None


def test_opening_asks_nothing() -> None:
    tier = open_redis(load_config(None, {"redis_url": "redis://192.0.2.1:1"}, {}), Told())
    assert tier is not None
    assert tier.state == "closed"
    tier.close()
