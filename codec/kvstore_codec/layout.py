"""What a stored KV array *means*: model, weights, dtype, layers, positions, partition.

`KVLayout` is the whole identity under which KV is interchangeable. Its canonical bytes (JSON with sorted keys,
no spaces, floats as C99 hexadecimal) hash to the namespace id; two layouts that differ in any field have
different ids, and the same layout has the same id in every process, machine and Python version.

The array a layout describes has the axes `[layers, 2, tokens, kv_heads, head_dim]` (0 = K, 1 = V) when all
layers have one shape, else it is a list of `(k, v)` pairs, `k: [tokens, kv_heads, k_dim]` and
`v: [tokens, kv_heads, v_dim]`. Keys are as the engine caches them: after RoPE.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

from kvstore_codec.errors import LayoutError

LAYOUT_FORMAT_VERSION = 1
CHUNK_TOKENS_MIN, CHUNK_TOKENS_MAX = 16, 2048
LAYERS_MAX = 4096
CHANNELS_MAX = 1 << 16  # kv_heads × dim of one plane
FACTOR_MIN = 2.0**-20  # of a rope scaling
CANONICAL_BYTES_MAX = 1 << 20  # 4096 layers written out need about 0.8 MB

#: bytes per element of every dtype a layout may name
DTYPE_BYTES = {
    "bfloat16": 2, "float16": 2, "float32": 4,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1,
}  # fmt: skip


class LayerKind(str, Enum):
    FULL = "full"  # every token is kept
    SLIDING = "sliding"  # only the last `window` tokens matter
    MLA = "mla"  # one latent without heads; v_dim may be 0
    STATE = "state"  # recurrent state


@dataclass(frozen=True)
class RopeScaling:
    """How the model stretches its rotary frequencies. `kind`: "linear" (all frequencies divided by `factor`)
    or "llama3" (Llama 3.1's frequency-dependent rule; needs the last three fields)."""

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None

    def __post_init__(self) -> None:
        _exact_types(self)
        if self.kind not in ("linear", "llama3"):
            raise LayoutError(f'unknown rope scaling {self.kind!r}: use "linear", "llama3", or rope=None')
        needs = (self.low_freq_factor, self.high_freq_factor, self.original_max_position)
        if self.kind == "llama3" and any(value is None for value in needs):
            raise LayoutError("llama3 rope scaling needs low_freq_factor, high_freq_factor and original_max_position")
        _positive_floats(self, "factor", "low_freq_factor", "high_freq_factor")
        if not FACTOR_MIN <= self.factor <= 1 / FACTOR_MIN:
            raise LayoutError("a rope scaling factor is 2**-20 to 2**20", factor=self.factor)
        if self.kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise LayoutError("low_freq_factor and high_freq_factor must differ", both=self.low_freq_factor)


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding of a layer's keys.

    `rotary_dims` is how many of the head's leading dimensions rotate (None: all). `interleaved` pairs
    dimensions (2i, 2i+1) as GPT-J does; otherwise (i, i + rotary_dims/2) as Llama does.
    """

    theta: float
    rotary_dims: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _exact_types(self)
        _positive_floats(self, "theta")
        if self.theta < 1:  # frequencies above a radian a token: no model has them, and angles lose their precision
            raise LayoutError("rope theta must be at least 1", theta=self.theta)
        if self.rotary_dims is not None and (self.rotary_dims < 2 or self.rotary_dims % 2):
            raise LayoutError("rotary_dims must be even and at least 2", rotary_dims=self.rotary_dims)


@dataclass(frozen=True)
class LayerSpec:
    """Shape and kind of one layer's cache. `rope=None`: keys are stored as they are."""

    kv_heads: int
    k_dim: int
    v_dim: int
    kind: LayerKind = LayerKind.FULL
    window: int | None = None
    rope: RoPE | None = None

    def __post_init__(self) -> None:
        _exact_types(self)
        object.__setattr__(self, "kind", _enum(LayerKind, self.kind))
        if self.kv_heads < 1 or self.k_dim < 1 or self.v_dim < 0:
            raise LayoutError("a layer needs kv_heads >= 1, k_dim >= 1 and v_dim >= 0")
        if self.kv_heads * max(self.k_dim, self.v_dim) > CHANNELS_MAX:
            raise LayoutError(f"a layer may have at most {CHANNELS_MAX} channels")
        if (self.kind is LayerKind.SLIDING) != (self.window is not None):
            raise LayoutError("window goes with kind sliding, and only with it")
        if self.window is not None and self.window < 1:
            raise LayoutError("window must be at least 1", window=self.window)
        if self.rope is not None and self.rope.rotary_dims is not None and self.rope.rotary_dims > self.k_dim:
            raise LayoutError("rotary_dims exceeds k_dim")
        if self.rope is not None and self.rope.rotary_dims is None and self.k_dim % 2:
            raise LayoutError("rope over the whole head needs an even k_dim", k_dim=self.k_dim)

    @property
    def k_channels(self) -> int:
        return self.kv_heads * self.k_dim

    @property
    def v_channels(self) -> int:
        return self.kv_heads * self.v_dim


@dataclass(frozen=True)
class Partition:
    """How one chunk is cut into parts: `layer_groups` (pipeline) × `head_groups` (tensor parallel)."""

    layer_groups: int = 1
    head_groups: int = 1

    def __post_init__(self) -> None:
        _exact_types(self)
        if self.layer_groups < 1 or self.head_groups < 1:
            raise LayoutError("a partition has at least one layer group and one head group")

    @property
    def parts(self) -> int:
        return self.layer_groups * self.head_groups


@dataclass(frozen=True)
class KVLayout:
    model: str
    revision: str
    dtype: str
    chunk_tokens: int
    layers: tuple[LayerSpec, ...]
    partition: Partition = field(default_factory=Partition)
    format_version: int = LAYOUT_FORMAT_VERSION

    def __post_init__(self) -> None:
        _exact_types(self)
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.format_version != LAYOUT_FORMAT_VERSION:
            raise LayoutError("this layout was written by another version", version=self.format_version)
        if not self.model or not self.revision:
            raise LayoutError("model and revision must not be empty: they keep models apart")
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"unknown dtype {self.dtype!r}: use one of {', '.join(DTYPE_BYTES)}")
        if not CHUNK_TOKENS_MIN <= self.chunk_tokens <= CHUNK_TOKENS_MAX:
            raise LayoutError(
                f"chunk_tokens must be {CHUNK_TOKENS_MIN}–{CHUNK_TOKENS_MAX}", chunk_tokens=self.chunk_tokens
            )
        if not 1 <= len(self.layers) <= LAYERS_MAX:
            raise LayoutError(f"a layout has 1–{LAYERS_MAX} layers", layers=len(self.layers))
        if len(self.layers) % self.partition.layer_groups:
            raise LayoutError("layer_groups must divide the number of layers")
        if any(layer.kv_heads % self.partition.head_groups for layer in self.layers):
            raise LayoutError("head_groups must divide kv_heads of every layer")

    @classmethod
    def uniform(
        cls, *, model: str, revision: str, num_layers: int, kv_heads: int, head_dim: int,
        dtype: str = "bfloat16", chunk_tokens: int = 256, rope: RoPE | None = None,
        partition: Partition | None = None,
    ) -> KVLayout:  # fmt: skip
        """A model whose layers are all full attention of one shape (Llama, Qwen, Mistral …)."""
        layer = LayerSpec(kv_heads=kv_heads, k_dim=head_dim, v_dim=head_dim, rope=rope)
        return cls(model, revision, dtype, chunk_tokens, (layer,) * num_layers, partition or Partition())

    def __hash__(self) -> int:
        """Cheap after the first time, so that layouts can be keys of what is remembered."""
        return hash(self.namespace_id)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def is_uniform(self) -> bool:
        """All layers have one shape and K is as wide as V, so the cache is one 5-D array."""
        first = self.layers[0]
        return first.k_dim == first.v_dim and all(
            (layer.kv_heads, layer.k_dim, layer.v_dim) == (first.kv_heads, first.k_dim, first.v_dim)
            for layer in self.layers
        )

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def elements_per_token(self) -> int:
        return sum(layer.k_channels + layer.v_channels for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        return self.elements_per_token * self.itemsize

    def part_layout(self, part: int) -> KVLayout:
        """The layout of one part's slice: its layer group's layers with its head group's heads."""
        if not 0 <= part < self.partition.parts:
            raise LayoutError("no such part", part=part, parts=self.partition.parts)
        if self.partition.parts == 1:
            return self
        if part not in self._parts:
            self._parts[part] = self._part_layout(part)
        return self._parts[part]

    @cached_property
    def _parts(self) -> dict[int, KVLayout]:
        """Of the parts that were asked for: every object of a part asks again."""
        return {}

    def _part_layout(self, part: int) -> KVLayout:
        per_group = len(self.layers) // self.partition.layer_groups
        first = part // self.partition.head_groups * per_group
        layers = tuple(
            LayerSpec(
                layer.kv_heads // self.partition.head_groups, layer.k_dim, layer.v_dim,
                layer.kind, layer.window, layer.rope,
            )
            for layer in self.layers[first : first + per_group]
        )  # fmt: skip
        return KVLayout(self.model, self.revision, self.dtype, self.chunk_tokens, layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KVLayout:
        """Inverse of `to_dict`; unknown or missing fields raise LayoutError."""
        data = dict(data)
        layers = data.get("layers")
        if not isinstance(layers, list | tuple):
            raise LayoutError("a layout needs a list of layers")
        data["layers"] = tuple(_build(LayerSpec, layer, rope=_build_rope) for layer in layers)
        data["partition"] = _build(Partition, data.get("partition") or {})
        layout: KVLayout = _build(cls, data)
        return layout

    @cached_property
    def canonical_bytes(self) -> bytes:
        text = json.dumps(_canonical(self.to_dict()), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8")

    @classmethod
    def from_canonical_bytes(cls, data: bytes) -> KVLayout:
        """Raises LayoutError for anything but the exact canonical bytes of a valid layout."""
        if len(data) > CANONICAL_BYTES_MAX:
            raise LayoutError("layout bytes are too long", bytes=len(data))
        try:
            parsed = json.loads(data.decode("utf-8"), parse_float=_no_float, object_hook=_floats_back)
        except LayoutError:
            raise
        except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, an integer of absurd length
            raise LayoutError(f"layout bytes are not canonical JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise LayoutError("layout bytes are not a JSON object")
        layout = cls.from_dict(parsed)
        if layout.canonical_bytes != data:
            raise LayoutError("layout bytes are not in canonical form")
        return layout

    @cached_property
    def namespace_id(self) -> bytes:
        """BLAKE2b-256 of the canonical bytes (32 bytes)."""
        return namespace_id_of(self.canonical_bytes)

    @cached_property
    def model_id(self) -> bytes:
        """The namespace id with 16-token chunks and no partition (32 bytes): what profiles belong to."""
        return replace(self, chunk_tokens=CHUNK_TOKENS_MIN, partition=Partition()).namespace_id


def namespace_id_of(canonical_bytes: bytes) -> bytes:
    return hashlib.blake2b(canonical_bytes, digest_size=32, person=b"kvstore.layout").digest()


def _exact_types(instance: Any) -> None:
    """Integers, strings and booleans are what they say: 3 and 3.0, or "16" and 16, must not be two identities."""
    for member in fields(instance):
        name, kinds, value = member.name, str(member.type).split(" | "), getattr(instance, member.name)
        if value is None and "None" in kinds:
            continue
        if kinds[0] == "int":
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise LayoutError(f"{name} must be an integer", value=repr(value))
            object.__setattr__(instance, name, operator.index(value))
        elif kinds[0] in ("str", "bool") and type(value).__name__ != kinds[0]:
            raise LayoutError(f"{name} must be a {kinds[0]}", value=repr(value))
        elif kinds[0] == "str" and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise LayoutError(f"{name} must be text that UTF-8 can hold", value=repr(value))


def _positive_floats(instance: object, *names: str) -> None:
    """Coerce to float in place, so that 10000 and 10000.0 are one identity."""
    for name in names:
        value = getattr(instance, name)
        if value is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise LayoutError(f"{name} must be a number", value=value) from None
        if not (math.isfinite(number) and number > 0):
            raise LayoutError(f"{name} must be a positive finite number", value=value)
        object.__setattr__(instance, name, number)


def _enum(kind: type[LayerKind], value: object) -> LayerKind:
    try:
        return kind(value)
    except ValueError:
        raise LayoutError(f"unknown layer kind {value!r}: use one of {', '.join(kind)}") from None


def _build(cls: type[Any], data: Any, **nested: Any) -> Any:
    if not isinstance(data, dict):
        raise LayoutError(f"{cls.__name__} must be an object of its fields", got=type(data).__name__)
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise LayoutError(f"unknown field in {cls.__name__}: {', '.join(map(str, unknown))}")
    values = {name: nested[name](value) if name in nested else value for name, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise LayoutError(f"{cls.__name__}: {error}") from error


def _build_rope(data: Any) -> RoPE | None:
    if data is None:
        return None
    return _build(RoPE, data, scaling=lambda s: None if s is None else _build(RopeScaling, s))  # type: ignore[no-any-return]


def _canonical(value: Any) -> Any:
    """JSON has one number type and no exact floats: a float travels as {"float": hex}."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value


def _no_float(text: str) -> float:
    raise LayoutError("layout bytes hold a decimal float; canonical floats are hexadecimal", value=text)


def _floats_back(data: dict[str, Any]) -> Any:
    if set(data) == {"float"}:
        try:
            return float.fromhex(data["float"])
        except (TypeError, ValueError, OverflowError):
            raise LayoutError("bad float in layout bytes", value=data["float"]) from None
    return data
