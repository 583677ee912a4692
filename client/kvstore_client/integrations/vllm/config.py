"""What `kv_connector_extra_config` may hold. A mistake in it is an InvalidArgument that says what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvstore_client.errors import InvalidArgument
from kvstore_client.target import parse_target
from kvstore_client.tls import TLS
from kvstore_client.transports.bulk_path import Transport, checked_transport
from kvstore_codec import Quality
from kvstore_codec.layout import CHUNK_TOKENS_MAX

CHUNK_TOKENS = 256  # or the next multiple of the engine's block


@dataclass(frozen=True)
class ConnectorConfig:
    """`address`: of the node, as `Client` takes it; the only key without a default.

    `quality`: at which KV is stored, and the least that is loaded. `chunk_tokens`: tokens of a chunk, a multiple of the
    engine's block size (default: the first from 256 on). `lookup_s`: what asking the node may delay a request.
    `deadline_s`: of a load, which is cut short then, and of a save. `stage_mib`: host memory for KV that is on its way
    to the node; what does not fit is not saved. `transport`: as `Client` takes it. `revision`: which weights these are,
    in place of a digest of their files. `head_groups`: into how many parts of as many KV heads each a chunk is stored,
    a multiple of the engine's tensor parallel size, which is the default. `layer_groups`: into how many parts of
    as many layers each, by default one for each stage of the engine's pipeline. `planner`: whether a prefix that the
    node holds is loaded only where that is faster than computing it. `tls_ca`, `tls_cert`, `tls_key`,
    `tls_server_name`: as `TLS` takes them.
    """

    address: str
    quality: str = "lossless"
    chunk_tokens: int | None = None
    lookup_s: float = 0.5
    deadline_s: float = 10.0
    stage_mib: int = 256
    transport: Transport = "auto"
    revision: str | None = None
    head_groups: int | None = None
    layer_groups: int | None = None
    planner: bool = True
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_server_name: str | None = None

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Raises InvalidArgument."""
        check_keys("kv_connector_extra_config", extra, [each.name for each in fields(cls)])
        if "address" not in extra:
            raise InvalidArgument('kv_connector_extra_config needs the node: {"address": "127.0.0.1:7070"}')
        config = cls(**extra)
        parse_target(config.address)
        Quality.parse(config.quality)
        checked_transport(config.transport)
        for name in ("lookup_s", "deadline_s"):
            value = getattr(config, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InvalidArgument(f"{name} is a positive number of seconds", got=value)
        for name in ("chunk_tokens", "stage_mib", "head_groups", "layer_groups"):
            value = getattr(config, name)
            optional = name != "stage_mib" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidArgument(f"{name} is a positive integer", got=value)
        if config.revision is not None and (not isinstance(config.revision, str) or not config.revision):
            raise InvalidArgument("revision is a text that is other for other weights", got=config.revision)
        if not isinstance(config.planner, bool):
            raise InvalidArgument("planner is true or false", got=config.planner)
        for name in ("tls_ca", "tls_cert", "tls_key", "tls_server_name"):
            value = getattr(config, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidArgument(f"{name} is a text", got=value)
            if value is not None and config.tls_ca is None:
                raise InvalidArgument(f"{name} is of no use without tls_ca, the certificates that sign the node's")
        return config

    @property
    def tls(self) -> TLS | None:
        if self.tls_ca is None:
            return None
        return TLS(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)

    def chunk_tokens_for(self, page_tokens: int) -> int:
        """Tokens of a chunk in an engine with such blocks. Raises InvalidArgument."""
        if self.chunk_tokens is not None and self.chunk_tokens % page_tokens:
            raise InvalidArgument(
                "chunk_tokens must be a multiple of the engine's block size",
                chunk_tokens=self.chunk_tokens, block_size=page_tokens,
            )  # fmt: skip
        chosen = self.chunk_tokens or -(-CHUNK_TOKENS // page_tokens) * page_tokens
        if chosen > CHUNK_TOKENS_MAX:
            raise InvalidArgument(
                f"a chunk has at most {CHUNK_TOKENS_MAX} tokens: use a smaller --block-size", block_size=page_tokens
            )  # fmt: skip
        return chosen

    def head_groups_for(self, kv_heads: int, workers: int) -> int:
        """Of a model with so many KV heads in an engine that shards them over so many workers. Raises
        InvalidArgument."""
        chosen = self.head_groups or workers
        if chosen % workers or kv_heads % chosen:
            raise InvalidArgument(
                "head_groups must be a multiple of tensor_parallel_size and divide the model's KV heads",
                head_groups=chosen, tensor_parallel_size=workers, kv_heads=kv_heads,
            )  # fmt: skip
        return chosen

    def layer_groups_for(self, stages: Sequence[int]) -> int:
        """Of an engine whose pipeline stages have so many layers each: each takes whole groups. Raises
        InvalidArgument."""
        layers = sum(stages)
        if min(stages) < 1:
            raise InvalidArgument("each pipeline stage needs a layer", layers_of_stages=tuple(stages))
        fewest = layers // math.gcd(*stages)
        if self.layer_groups is None and fewest > len(stages):
            # One of the possible numbers costs many small objects: not to be chosen behind anybody's back.
            raise InvalidArgument(
                "the pipeline's stages do not have equally many layers: set VLLM_PP_LAYER_PARTITION so that they do or "
                f'say "layer_groups": {fewest}', layers_of_stages=tuple(stages),
            )  # fmt: skip
        chosen = self.layer_groups or fewest
        if chosen % fewest or layers % chosen:
            raise InvalidArgument(
                f"layer_groups must be a multiple of {fewest}, so that each stage has whole groups, and divide the "
                "model's layers", layer_groups=chosen, layers=layers, layers_of_stages=tuple(stages),
            )  # fmt: skip
        return chosen

    @property
    def provenance(self) -> Quality:
        """What KV computed on loaded prefixes is at best: the engine's own cache does not tell loaded blocks from
        computed ones, so all that this engine stores counts as computed on the least that it loads."""
        quality = Quality.parse(self.quality)
        return Quality.RAW if quality.exact else quality


def check_keys(what: str, given: Iterable[str], known: Sequence[str], hidden: Sequence[str] = ()) -> None:
    """Raises InvalidArgument for a key that `what` does not take. `hidden`: taken, but nobody's to write."""
    for key in given:
        if key not in known and key not in hidden:
            close = difflib.get_close_matches(str(key), [*known, *hidden], 1)
            raise InvalidArgument(
                f"{what} has no key {key!r}: "
                + (f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}")
            )
