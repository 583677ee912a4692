"""The keys redis_* of a node's configuration. Checked without `redis`: reading a configuration stays quick."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, SecretStr, model_validator

from kvstore.tiers.redis_url import RedisUrl, parse_redis_urls

#: Keys whose values are not shown.
SECRET_KEYS = frozenset({"redis_url"})


def _url(value: SecretStr) -> SecretStr:
    parse_redis_urls(value.get_secret_value())
    return value


class RedisConfig(BaseModel):
    """Part of `NodeConfig`."""

    redis_url: Annotated[SecretStr, AfterValidator(_url)] | None = Field(
        default=None,
        description="redis://[user:password@]host[:port][/db], rediss://… (TLS) or unix:///path; none: no Redis tier",
    )
    redis_cluster: bool = Field(
        default=False, description="redis_url names nodes of a Redis Cluster, several with commas"
    )
    redis_password_file: Path | None = Field(
        default=None, description="file with the password, instead of writing it into redis_url"
    )
    redis_ca: Path | None = Field(
        default=None, description="certificates (PEM) that sign Redis'; none: those of the system"
    )
    redis_cert: Path | None = Field(default=None, description="this node's certificate for Redis (PEM)")
    redis_key: Path | None = Field(default=None, description="its private key (PEM)")
    redis_ttl_s: int = Field(
        default=86_400,
        ge=0,
        le=10 * 365 * 86_400,
        description="seconds that an object outlives its last use; 0: no end",
    )
    redis_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = Field(
        default="kvstore", description="first part of our keys in Redis; nodes that share objects use the same"
    )
    redis_timeout_ms: int = Field(
        default=250, ge=1, le=60_000, description="longest wait for Redis; a whole call takes at most four of them"
    )
    redis_write: Literal["off", "behind", "through"] = Field(
        default="behind",
        description="what is put goes to Redis: never (it is only read), behind the put, before its answer",
    )

    @property
    def redis_urls(self) -> tuple[RedisUrl, ...]:
        """Empty where there is no Redis tier."""
        return () if self.redis_url is None else parse_redis_urls(self.redis_url.get_secret_value())

    @model_validator(mode="after")
    def _redis_fits_together(self) -> RedisConfig:
        urls = self.redis_urls
        for key in ("redis_cluster", "redis_password_file", "redis_ca", "redis_cert"):
            if not urls and getattr(self, key):
                raise ValueError(f"{key} is set without redis_url: set that, too, or unset {key}")
        if (self.redis_cert is None) != (self.redis_key is None):
            raise ValueError("redis_cert and redis_key belong together: set both or none")
        for key in ("redis_ca", "redis_cert"):
            if getattr(self, key) is not None and not urls[0].tls:
                raise ValueError(f"{key} is set, but redis_url is not rediss://: write that, or unset {key}")
        if any(url.password for url in urls) and self.redis_password_file is not None:
            raise ValueError("redis_url has a password and there is a redis_password_file: keep one")
        if len(urls) > 1 and not self.redis_cluster:
            raise ValueError("redis_url names several servers: set redis_cluster = true, or keep one")
        if self.redis_cluster and any(url.path or url.db for url in urls):
            raise ValueError(
                "a Redis Cluster has neither Unix sockets nor databases: write redis_url as redis://host:port"
            )
        if any(replace(url, host="", port=0) != replace(urls[0], host="", port=0) for url in urls):
            raise ValueError("the servers of redis_url may differ in host and port only: write the rest alike")
        return self
