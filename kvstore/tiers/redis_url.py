"""The address of a Redis server, as operators write it:

    redis://[user][:password]@host[:port][/db]     rediss://… the same over TLS     unix:///path/to/socket

Several, with commas, are the first nodes to ask of a Cluster. User and password are percent-encoded where they contain
one of  % @ : / ? # ,  as in any URL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

DEFAULT_PORT = 6379


@dataclass(frozen=True)
class RedisUrl:
    """`path` is set for a Unix socket, `host` and `port` otherwise."""

    host: str
    port: int
    path: str
    tls: bool
    db: int
    username: str | None
    password: str | None = field(repr=False)

    @property
    def address(self) -> str:
        """What names the server in logs and metrics."""
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


def parse_redis_urls(urls: str) -> tuple[RedisUrl, ...]:
    """Raises ValueError; the message names the fix and repeats nothing of the URL, which may hold a password."""
    return tuple(_parse(url.strip()) for url in urls.split(","))


def _parse(url: str) -> RedisUrl:
    form = "must be redis://[user:password@]host[:port][/db], rediss://… for TLS, or unix:///path"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(form) from None
    if parts.query or parts.fragment:
        raise ValueError("takes no options after '?' or '#': use the keys redis_*; percent-encode these in a password")
    username = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password else None
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.hostname:
            raise ValueError(form)
        return RedisUrl("", 0, unquote(parts.path), False, 0, username, password)
    db = parts.path.removeprefix("/")
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or not (db == "" or db.isdecimal()):
        raise ValueError(form)
    port = DEFAULT_PORT if port is None else port
    return RedisUrl(parts.hostname, port, "", parts.scheme == "rediss", int(db or 0), username, password)
