"""Objects as they lie in Redis."""

from __future__ import annotations

from collections.abc import Callable

import kv_objects as kv
import redis_process
from tier_objects import LAYOUT, key_of

from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_format import value_key

Server = redis_process.RedisProcess | redis_process.RedisCluster
MakeRedis = Callable[..., RedisTier]
CHUNKS = {quality: kv.chunks(LAYOUT, 6, seed=1, quality=quality) for quality in ("low", "high", "raw")}


def name_of(chunk: kv.StoredChunk) -> bytes:
    return value_key("kvstore", key_of(chunk))


def home_of(server: Server, name: bytes) -> redis_process.RedisProcess:
    return server.master_of(name) if isinstance(server, redis_process.RedisCluster) else server


def spoilt(server: Server, chunk: kv.StoredChunk, value: bytes) -> None:
    """A stranger's value in the place of a chunk."""
    home_of(server, name_of(chunk)).command("SET", name_of(chunk), value)


def gone(server: Server, chunk: kv.StoredChunk) -> bool:
    return not home_of(server, name_of(chunk)).command("EXISTS", name_of(chunk))
