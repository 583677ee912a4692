"""The keys upstream* of a node's configuration: the nodes that it asks for what it lacks, as a sidecar does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator


def _seeds(value: str) -> str:
    from kvstore_client.target import parse_target  # not before it is needed: it loads gRPC

    parse_target(value)
    return value


class UpstreamConfig(BaseModel):
    """Part of `NodeConfig`."""

    upstream: Annotated[str, AfterValidator(_seeds)] | None = Field(
        default=None,
        description="nodes asked for what this one lacks: host:port or unix:/path, several with commas; none: no node",
    )
    upstream_timeout_ms: int = Field(
        default=250, ge=1, le=60_000, description="longest wait for a node upstream to answer a lookup, or to go on"
    )
    upstream_transport: Literal["auto", "grpc", "tcp", "unix", "shm"] = Field(
        default="auto",
        description="how objects come from upstream: auto: the best way that works; grpc, tcp, unix, shm: that one, or "
        "gRPC where it cannot be had",
    )
    upstream_write: Literal["off", "behind", "through"] = Field(
        default="behind",
        description="what is put goes upstream behind the put, before it is answered, or never: off",
    )

    upstream_tls_ca: Path | None = Field(
        default=None, description="certificates (PEM) that sign those of the nodes upstream; none: no TLS to them"
    )
    upstream_tls_cert: Path | None = Field(
        default=None, description="this node's certificate (PEM) for nodes upstream that ask for one"
    )
    upstream_tls_key: Path | None = Field(default=None, description="its private key (PEM)")
    upstream_tls_name: str | None = Field(
        default=None, min_length=1, description="what those nodes' certificates are for; none: the host in upstream"
    )

    @model_validator(mode="after")
    def _upstream_tls_fits_together(self) -> UpstreamConfig:
        for key in ("upstream_tls_cert", "upstream_tls_key", "upstream_tls_name"):
            if getattr(self, key) is not None and self.upstream_tls_ca is None:
                raise ValueError(f"{key} is set without upstream_tls_ca: set that, too, or unset {key}")
        if (self.upstream_tls_cert is None) != (self.upstream_tls_key is None):
            raise ValueError("upstream_tls_cert and upstream_tls_key belong together: set both or none")
        if self.upstream_tls_ca is not None and self.upstream is None:
            raise ValueError("upstream_tls_ca is set without upstream: set that, too, or unset upstream_tls_ca")
        return self

    @property
    def upstream_seeds(self) -> tuple[str, ...]:
        """Spelled as a client of the same nodes spells them: placement goes by their names."""
        from kvstore_client.target import parse_target

        return () if self.upstream is None else parse_target(self.upstream)
