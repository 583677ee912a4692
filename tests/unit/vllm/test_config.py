"""`kv_connector_extra_config`: every mistake is named with its remedy."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore_client import TLS, InvalidArgument, Quality
from kvstore_client.integrations.vllm.config import ConnectorConfig


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "needs the node"),
        ({"address": "h:1", "chunk_token": 128}, "no key 'chunk_token': did you mean 'chunk_tokens'"),
        ({"address": "h:1", "zzz": 1}, "no key 'zzz': it takes address, quality"),
        ({"address": "nowhere"}, "bad target"),
        ({"address": "h:1", "quality": "best"}, "quality"),
        ({"address": "h:1", "transport": "pigeon"}, "transport"),
        ({"address": "h:1", "deadline_s": 0}, "deadline_s is a positive number"),
        ({"address": "h:1", "lookup_s": "1"}, "lookup_s is a positive number"),
        ({"address": "h:1", "stage_mib": True}, "stage_mib is a positive integer"),
        ({"address": "h:1", "chunk_tokens": 128.0}, "chunk_tokens is a positive integer"),
        ({"address": "h:1", "revision": ""}, "revision is a text"),
        ({"address": "h:1", "planner": "off"}, "planner is true or false"),
        ({"address": "h:1", "tls_ca": 1}, "tls_ca is a text"),
        ({"address": "h:1", "tls_cert": "c.pem", "tls_key": "k.pem"}, "tls_cert is of no use without tls_ca"),
    ],
)
def test_mistakes(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConnectorConfig.from_extra(extra)


@pytest.mark.parametrize(
    ("asked", "block", "chosen"), [(None, 16, 256), (None, 48, 288), (None, 512, 512), (128, 16, 128)]
)
def test_a_chunk_is_whole_blocks(asked: int | None, block: int, chosen: int) -> None:
    assert ConnectorConfig("h:1", chunk_tokens=asked).chunk_tokens_for(block) == chosen


@pytest.mark.parametrize(("asked", "block", "message"), [(100, 16, "multiple"), (None, 4096, "smaller --block-size")])
def test_blocks_that_no_chunk_fits(asked: int | None, block: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ConnectorConfig("h:1", chunk_tokens=asked).chunk_tokens_for(block)


def test_what_is_computed_on_lossy_prefixes_says_so() -> None:
    assert ConnectorConfig("h:1").provenance is Quality.RAW
    assert ConnectorConfig("h:1", quality="high").provenance is Quality.HIGH


def test_tls() -> None:
    assert ConnectorConfig.from_extra({"address": "h:1"}).tls is None
    keys = {"tls_ca": "ca.pem", "tls_cert": "c.pem", "tls_key": "k.pem", "tls_server_name": "node"}
    assert ConnectorConfig.from_extra({"address": "h:1", **keys}).tls == TLS("ca.pem", "c.pem", "k.pem", "node")
