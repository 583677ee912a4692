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
        ({"address": "h:1", "layer_groups": 0}, "layer_groups is a positive integer"),
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


@pytest.mark.parametrize(
    ("asked", "stages", "chosen"),
    [
        (None, [30], 1), (None, [15, 15], 2), (6, [15, 15], 6), (6, [10, 10, 10], 6), (30, [7, 8, 8, 7], 30),
        (4, [6, 2], 4), (2, [30], 2),
    ],
)  # fmt: skip
def test_each_stage_has_whole_groups_of_layers(asked: int | None, stages: list[int], chosen: int) -> None:
    assert ConnectorConfig("h:1", layer_groups=asked).layer_groups_for(stages) == chosen


@pytest.mark.parametrize(
    ("asked", "stages", "message"),
    [
        (3, [15, 15], "layer_groups must be a multiple of 2.*layer_groups=3"),
        (4, [15, 15], "divide the model's layers.*layer_groups=4, layers=30"),
        (1, [15, 15], "multiple of 2"),
        (None, [7, 8, 8, 7], 'VLLM_PP_LAYER_PARTITION so that they do or say "layer_groups": 30'),
        (None, [6, 2], '"layer_groups": 4'),
        (2, [30, 0], "each pipeline stage needs a layer"),
    ],
)
def test_stages_that_no_groups_fit(asked: int | None, stages: list[int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ConnectorConfig("h:1", layer_groups=asked).layer_groups_for(stages)


def test_what_is_computed_on_lossy_prefixes_says_so() -> None:
    assert ConnectorConfig("h:1").provenance is Quality.RAW
    assert ConnectorConfig("h:1", quality="high").provenance is Quality.HIGH


def test_tls() -> None:
    assert ConnectorConfig.from_extra({"address": "h:1"}).tls is None
    keys = {"tls_ca": "ca.pem", "tls_cert": "c.pem", "tls_key": "k.pem", "tls_server_name": "node"}
    assert ConnectorConfig.from_extra({"address": "h:1", **keys}).tls == TLS("ca.pem", "c.pem", "k.pem", "node")
