"""From the keys redis_* of a configuration to a tier."""

from __future__ import annotations

import ssl
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.tiers.redis import Events, RedisTier
from kvstore.tiers.redis_config import RedisConfig
from kvstore.tiers.redis_connection import Credentials


def open_redis(config: RedisConfig, events: Events) -> RedisTier | None:
    """None where no redis_url is set. Redis itself is not asked: a node starts without it.

    Raises ConfigError for files that cannot be used."""
    if config.redis_url is None:
        return None
    return RedisTier(
        config.redis_urls,
        credentials_of(config),
        events,
        cluster=config.redis_cluster,
        prefix=config.redis_prefix,
        ttl_s=config.redis_ttl_s,
        timeout_s=config.redis_timeout_ms / 1000,
        read_only=config.redis_write == "off",
    )


def credentials_of(config: RedisConfig) -> Credentials:
    """Of a configuration with a redis_url. Raises ConfigError for files that cannot be used."""
    password = None if config.redis_password_file is None else _read_password(config.redis_password_file)
    if config.redis_urls[0].tls:
        _check_certificates(config)
    return Credentials(password, config.redis_ca, config.redis_cert, config.redis_key)


def _read_password(path: Path) -> str:
    """Without the line's end that editors leave."""
    try:
        password = path.read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        raise ConfigError([f"redis_password_file {path} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"redis_password_file {path} is not text: write the password into it as UTF-8"]) from None
    if not password:
        raise ConfigError([f"redis_password_file {path} is empty: write the password into it"])
    return password


def _check_certificates(config: RedisConfig) -> None:
    """Now, with a name, rather than at every connection."""
    key = "redis_ca"
    try:
        context = ssl.create_default_context(cafile=config.redis_ca)
        if config.redis_cert is not None:
            key = "redis_cert"
            context.load_cert_chain(config.redis_cert, config.redis_key)
    except OSError as error:  # an SSLError is one
        reason = error.strerror or error
        raise ConfigError([f"{key} {getattr(config, key)} cannot be used: {reason}: name a PEM file"]) from None
