"""The keys upstream* of a node's configuration: the nodes that it asks for what it lacks, as a sidecar does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field


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
    upstream_write: Literal["off", "behind", "through"] = Field(
        default="behind",
        description="what is put goes upstream behind the put, before it is answered, or never: off",
    )

    @property
    def upstream_seeds(self) -> tuple[str, ...]:
        """Spelled as a client of the same nodes spells them: placement goes by their names."""
        from kvstore_client.target import parse_target

        return () if self.upstream is None else parse_target(self.upstream)
