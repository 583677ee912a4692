"""encode → decode, over every layout, dtype and quality; and that the NumPy reference and the C++ core agree."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from coders import NATIVE, REFERENCE
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kv_strategies import bits, layouts, random_kv

import kvstore_codec as codec

ALL_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
UNIFORM = codec.KVLayout.uniform(
    model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, chunk_tokens=64, rope=codec.RoPE(10000.0)
)
positions = st.sampled_from([0, 1, 3, 4, 100, 100_000])


@given(layouts(dtypes=ALL_DTYPES), st.integers(1, 16), st.integers(0, 2**32), positions)
@settings(deadline=None, max_examples=60)
def test_exact_qualities_restore_every_bit(layout: codec.KVLayout, tokens: int, seed: int, position: int) -> None:
    rng = np.random.default_rng(seed)
    kv = codec.empty(layout, tokens)
    for array in [a for pair in kv for a in pair] if isinstance(kv, list) else [kv]:
        array.view(np.uint8)[...] = rng.integers(0, 256, array.view(np.uint8).shape, np.uint8)
    for quality in ("raw", "lossless"):
        blob = codec.encode(kv, layout, quality=quality, first_position=position)
        assert bits(codec.decode(blob, layout)) == bits(kv)
        assert codec.verify(blob).quality <= codec.Quality.LOSSLESS
        assert codec.encode(kv, layout, quality=quality, first_position=position, coder=REFERENCE) == blob
        assert bits(codec.decode(blob, layout, coder=REFERENCE)) == bits(kv)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lossless_is_exact_for_all_65536_patterns(dtype: str) -> None:
    layout = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=4, head_dim=64, dtype=dtype, chunk_tokens=64
    )
    kv = np.arange(65536, dtype=np.uint16).reshape(2, 2, 64, 4, 64).view(codec.empty(layout, 1).dtype)
    assert bits(codec.decode(codec.encode(kv, layout, quality="lossless"), layout)) == bits(kv)


@given(layouts(), st.integers(1, 40), st.integers(0, 2**32), positions)
@settings(deadline=None, max_examples=60)
def test_reference_and_native_agree_bit_for_bit(layout: codec.KVLayout, tokens: int, seed: int, position: int) -> None:
    kv = random_kv(layout, min(tokens, layout.chunk_tokens), seed)
    blob = codec.encode(kv, layout, quality="high", first_position=position)
    assert codec.encode(kv, layout, quality="high", first_position=position, coder=REFERENCE) == blob
    for quality in ("low", "medium", "high"):
        native = codec.decode(blob, layout, quality=quality)
        assert bits(native) == bits(codec.decode(blob, layout, quality=quality, coder=REFERENCE))


@given(st.integers(0, 2**32), st.sampled_from([16, 37, 256]), st.floats(0.5, 40.0))
@settings(deadline=None, max_examples=15)
def test_vector_scalar_and_reference_agree_on_whole_blocks(seed: int, tokens: int, tail: float) -> None:
    """Hundreds of components, heavy tails: whole blocks, symbols that escape, drains, streams that end inside."""
    layout = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=3, head_dim=48, dtype="float32", chunk_tokens=256,
        rope=codec.RoPE(theta=10000.0),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    kv = codec.empty(layout, tokens)
    kv[...] = rng.standard_t(tail, kv.shape)
    kv[:, :, rng.random(tokens) < 0.1] *= 0.01
    blob = codec.encode(kv, layout, quality="high", first_position=2)
    coders = [*NATIVE.values(), *([REFERENCE] if tokens < 256 else [])]  # NumPy takes its time
    assert all(codec.encode(kv, layout, quality="high", first_position=2, coder=coder) == blob for coder in coders)
    for quality in ("low", "medium", "high"):
        restored = [bits(codec.decode(blob, layout, quality=quality, coder=coder)) for coder in coders]
        assert all(each == restored[0] for each in restored)


@given(layouts(), st.integers(1, 40), st.integers(0, 2**32), positions)
@settings(deadline=None, max_examples=40)
def test_a_prefix_is_the_object_of_that_quality(layout: codec.KVLayout, tokens: int, seed: int, position: int) -> None:
    assume(not codec.storable_quality(layout, "low").exact)  # recurrent state alone has no lower quality
    kv = random_kv(layout, min(tokens, layout.chunk_tokens), seed)
    blob = codec.encode(kv, layout, quality="high", first_position=position)
    for quality in ("low", "medium", "high"):
        prefix = codec.truncate(blob, quality)
        assert codec.verify(prefix).quality.label == quality
        assert codec.parse_header(prefix).length_for(codec.Quality.parse(quality)) == len(prefix)
        assert bits(codec.decode(prefix, layout)) == bits(codec.decode(blob, layout, quality=quality))
        assert bits(codec.decode(prefix, layout, quality="high")) == bits(codec.decode(prefix, layout))
    sizes = [len(codec.truncate(blob, quality)) for quality in ("low", "medium", "high")]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == len(blob)


def planes_of(kv: Any) -> list[np.ndarray[Any, Any]]:
    pairs = kv if isinstance(kv, list) else [(layer[0], layer[1]) for layer in kv]
    return [array.astype(np.float64) for pair in pairs for array in pair]


@given(layouts(dtypes=("float32",)), st.integers(0, 2**32), positions)
@settings(deadline=None, max_examples=40)
def test_lossy_error_stays_within_the_step(layout: codec.KVLayout, seed: int, position: int) -> None:
    """Every value within half a step of D (a rotated pair: within √2 of that), D from the plane's own rms.

    A component too quiet to be coded may be off by its own size, up to 8 times its σ < 0.16 step in these data.
    """
    kv = random_kv(layout, layout.chunk_tokens, seed)
    blob = codec.encode(kv, layout, quality="high", first_position=position)
    for quality, levels in (("low", 0), ("medium", 1), ("high", 2)):
        restored = codec.decode(blob, layout, quality=quality)
        for index, (was, got) in enumerate(zip(planes_of(kv), planes_of(restored), strict=True)):
            if was.size == 0:
                continue
            if layout.layers[index // 2].kind is codec.LayerKind.STATE:
                assert (was == got).all(), "recurrent state is exact at every quality"
                continue
            rms_max = np.sqrt(np.mean(was**2)) * 1.2 + 1e-6
            factor = 0.75 * (0.67 if index % 2 else 1.0)
            peak = np.abs(was).max()
            step = max(factor * rms_max, peak * 2.0**-7) / 3**levels
            assert np.abs(was - got).max() <= 1.5 * step + 1e-5 * peak


def test_a_drain_token_far_out_in_another_layer_is_not_clipped() -> None:
    """A token may be quiet in one layer, so that the whole group codes it as a drain, and loud in the next."""
    kv = random_kv(UNIFORM, 64, 3)
    kv[...] = np.random.default_rng(3).standard_normal(kv.shape).astype(kv.dtype)
    kv[0, :, 20] *= 0.001
    kv[1, :, 20] = 30_000.0
    restored = codec.decode(codec.encode(kv, UNIFORM, quality="high"), UNIFORM)
    error = np.abs(restored[1, :, 20].astype(np.float32) - 30_000.0)
    assert error.max() <= 30_000 * 2.0**-8, "no worse than the dtype's own step"


def test_sinks_are_exact_at_every_quality() -> None:
    kv = random_kv(UNIFORM, 64, 7)
    restored = codec.decode(codec.encode(kv, UNIFORM, quality="low", first_position=2), UNIFORM)
    assert bits(restored[:, :, :2]) == bits(kv[:, :, :2])
    assert bits(restored[:, :, 2:]) != bits(kv[:, :, 2:])


def test_drain_tokens_are_finer() -> None:
    rng = np.random.default_rng(1)
    kv = rng.standard_normal((2, 2, 64, 2, 16)).astype(np.float32)
    kv[:, :, 20] *= 0.2
    kv16 = kv.astype(ml_dtypes.bfloat16)
    restored = codec.decode(codec.encode(kv16, UNIFORM, quality="low", first_position=9), UNIFORM)
    error = restored.astype(np.float32) - kv16.astype(np.float32)
    rms = np.sqrt((error**2).mean(axis=(0, 1, 3, 4)))
    assert rms[20] < 0.3 * np.median(rms)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("coder", [None, REFERENCE])
def test_values_that_no_quantiser_takes_are_refused_not_spread(bad: float, coder: Any) -> None:
    kv = random_kv(UNIFORM, 64, 3)
    kv[1, 0, 30, 1, 5] = bad
    arguments = {} if coder is None else {"coder": coder}
    with pytest.raises(codec.ValuesError, match="lossless"):
        codec.encode(kv, UNIFORM, quality="high", **arguments)
    assert bits(codec.decode(codec.encode(kv, UNIFORM, quality="lossless"), UNIFORM)) == bits(kv)
    kv = random_kv(UNIFORM, 64, 3)
    kv[1, 0, 3, 1, 5] = bad  # a sink is stored as it is, whatever it is
    blob = codec.encode(kv, UNIFORM, quality="high", **arguments)
    restored = codec.decode(blob, UNIFORM, **arguments)
    assert bits(restored[:, :, :4]) == bits(kv[:, :, :4])
    assert np.isfinite(restored[:, :, 4:].astype(np.float32)).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-5, 1e4, 1e29])
def test_extreme_scales(scale: float) -> None:
    layout = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=1, kv_heads=2, head_dim=8, dtype="float32", chunk_tokens=32
    )
    kv = (np.random.default_rng(0).standard_normal((1, 2, 32, 2, 8)) * scale).astype(np.float32)
    blob = codec.encode(kv, layout, quality="high")
    assert blob == codec.encode(kv, layout, quality="high", coder=REFERENCE)
    assert np.abs(codec.decode(blob, layout) - kv).max() <= 0.1 * scale


def test_constant_planes_survive() -> None:
    layout = codec.KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, chunk_tokens=64)
    kv = np.full((2, 2, 64, 2, 16), 5.0).astype(ml_dtypes.bfloat16)
    restored = codec.decode(codec.encode(kv, layout, quality="low", first_position=50), layout)
    assert np.abs(restored.astype(np.float32) - 5.0).max() <= 0.05


def test_threads_change_nothing() -> None:
    kv = random_kv(UNIFORM, 64, 5)
    blob = codec.encode(kv, UNIFORM, quality="high", threads=4)
    assert blob == codec.encode(kv, UNIFORM, quality="high")
    assert bits(codec.decode(blob, UNIFORM, threads=4)) == bits(codec.decode(blob, UNIFORM))


@pytest.mark.parametrize("quality", ["raw", "lossless", "high"])
def test_an_object_is_made_in_the_memory_that_is_given(quality: str) -> None:
    layout = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, dtype="float16", chunk_tokens=16
    )
    kv = random_kv(layout, 16, 1)
    memory = bytearray(b"x" * (1 << 20))
    asked: list[int] = []

    def allocate(size: int) -> memoryview:
        asked.append(size)
        return memoryview(memory)[:size]

    blob = codec.encode(kv, layout, quality=quality, allocate=allocate)
    assert blob.obj is memory
    assert blob == codec.encode(kv, layout, quality=quality)
    assert asked == [len(blob)]
    assert set(memory[len(blob) :]) == set(b"x")


def test_strided_input_and_output() -> None:
    whole = random_kv(UNIFORM, 64, 11)
    head_major = np.ascontiguousarray(whole.swapaxes(2, 3)).swapaxes(2, 3)  # an engine's [heads, tokens, dim]
    assert not head_major.flags.c_contiguous
    for quality in ("raw", "lossless", "high"):
        blob = codec.encode(whole[:, :, 8:40], UNIFORM, quality=quality, first_position=8)
        assert blob == codec.encode(head_major[:, :, 8:40], UNIFORM, quality=quality, first_position=8)
        expected = bits(codec.decode(blob, UNIFORM))
        for target in (np.zeros_like(whole), np.zeros_like(whole.swapaxes(2, 3)).swapaxes(2, 3)):
            codec.decode(blob, UNIFORM, out=target[:, :, 16:48])
            assert bits(target[:, :, 16:48]) == expected
            assert not target[:, :, :16].view(np.uint16).any()
            assert not target[:, :, 48:].view(np.uint16).any()


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda kv: codec.encode(kv.astype(np.float32), UNIFORM), "bfloat16"),
        (lambda kv: codec.encode(kv[:1], UNIFORM), "layers"),
        (lambda kv: codec.encode(kv[0], UNIFORM), "tokens"),
        (lambda kv: codec.encode(kv[:, :, :0], UNIFORM), "1 to chunk_tokens"),
        (lambda kv: codec.encode(np.concatenate([kv, kv], axis=2), UNIFORM), "chunk_tokens"),
        (lambda kv: codec.encode("kv", UNIFORM), "numpy"),
        (lambda kv: codec.encode([(kv[0, 0], kv[0, 1])], UNIFORM), "pair"),
        (lambda kv: codec.encode(kv, UNIFORM, quality="best"), "lossless"),
        (lambda kv: codec.encode(kv, UNIFORM, first_position=-1), "first_position"),
        (lambda kv: codec.encode(kv, UNIFORM, part=1), "part"),
        (lambda kv: codec.encode(kv, UNIFORM, chunk_hash=b"x"), "32 bytes"),
        (lambda kv: codec.decode(codec.encode(kv, UNIFORM), UNIFORM, out=kv[:, :, 1:]), "tokens"),
        (lambda kv: codec.decode(codec.encode(kv, UNIFORM), UNIFORM, out=np.broadcast_to(kv, kv.shape)), "read-only"),
    ],
)
def test_a_callers_mistake_is_one_line_that_names_the_fix(mistake: Any, says: str) -> None:
    with pytest.raises(codec.LayoutError, match=says) as error:
        mistake(random_kv(UNIFORM, 64, 1))
    assert "\n" not in str(error.value)


def test_an_object_of_another_identity_is_never_decoded() -> None:
    kv = random_kv(UNIFORM, 64, 1)
    blob = codec.encode(kv, UNIFORM, chunk_hash=b"a" * 32)
    other = codec.KVLayout.uniform(
        model="m", revision="r2", num_layers=2, kv_heads=2, head_dim=16, chunk_tokens=64, rope=codec.RoPE(10000.0)
    )
    for arguments in ({"layout": other}, {"layout": UNIFORM, "chunk_hash": b"b" * 32}, {"layout": UNIFORM, "part": 1}):
        with pytest.raises(codec.ForeignObject):
            codec.decode(blob, **arguments)


def test_parts_are_objects_of_their_own() -> None:
    layout = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=4, kv_heads=2, head_dim=16, chunk_tokens=64,
        rope=codec.RoPE(10000.0), partition=codec.Partition(2, 2),
    )  # fmt: skip
    whole = random_kv(layout, 64, 2)
    for part in range(4):
        group, head = divmod(part, 2)
        piece = whole[2 * group : 2 * group + 2, :, :, head : head + 1]
        blob = codec.encode(piece, layout, quality="lossless", part=part)
        assert codec.inspect(blob).header.part == part
        assert bits(codec.decode(blob, layout, part=part)) == bits(piece)


def test_torch_and_dlpack_arrays() -> None:
    torch = pytest.importorskip("torch")
    kv = torch.randn(2, 2, 64, 2, 16).bfloat16()
    as_numpy = kv.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    blob = codec.encode(kv, UNIFORM, quality="high")
    assert blob == codec.encode(as_numpy, UNIFORM, quality="high")

    class OnlyDLPack:
        def __dlpack__(self, **arguments: Any) -> Any:
            return kv.__dlpack__()

        def __dlpack_device__(self) -> Any:
            return kv.__dlpack_device__()

    assert codec.encode(OnlyDLPack(), UNIFORM, quality="high") == blob
    out = torch.zeros(2, 2, 100, 2, 16).bfloat16()
    assert codec.decode(blob, UNIFORM, out=out[:, :, 10:74]).data_ptr() == out[:, :, 10:].data_ptr()
    assert out[:, :, 10:74].view(torch.int16).numpy().tobytes() == bits(codec.decode(blob, UNIFORM))
    for name in ("float8_e4m3fn", "float8_e5m2", "float16", "float32", "int8", "uint8"):
        layout = codec.KVLayout.uniform(
            model="m", revision="r", num_layers=1, kv_heads=1, head_dim=8, dtype=name, chunk_tokens=16
        )
        values = torch.arange(256).reshape(1, 2, 16, 1, 8).to(getattr(torch, name))
        restored = codec.decode(codec.encode(values, layout, quality="lossless"), layout)
        assert bits(restored) == values.contiguous().view(torch.uint8).numpy().tobytes()


def grouped(count: int, wanted: int) -> tuple[int, int]:
    """`count` in groups of `wanted`, or of one where that does not go."""
    return (count // wanted, wanted) if count % wanted == 0 else (count, 1)


def places(cache: Any, tokens: Any, block_ids: Any) -> tuple[Any, ...]:
    """Where a cache of pages has these tokens."""
    axes = cache.shape[1 : cache.ndim // 2]
    page_tokens = int(np.prod(axes))
    return np.asarray(block_ids)[tokens // page_tokens], *np.unravel_index(tokens % page_tokens, axes)


def paged(
    kv: Any, layout: codec.KVLayout, page_tokens: int, first_token: int, order: Any, tiles: bool = False
) -> codec.PagedKV:
    """`kv` spread over pages in a shuffled order, head-major pages, so that rows do not lie together. `tiles`: of 4
    tokens by 2 elements, or what goes."""
    pairs = kv if isinstance(kv, list) else [(layer[0], layer[1]) for layer in kv]
    tokens = pairs[0][0].shape[0]
    pages = -(-(first_token + tokens) // page_tokens)
    block_ids = order.permutation(pages + 2)[:pages]
    caches: list[tuple[Any, Any]] = []
    for pair in pairs:
        sides: list[Any] = []
        for array in pair:
            heads, dim = array.shape[1:]
            if tiles:
                (groups, group), (dim_groups, group_dim) = grouped(page_tokens, 4), grouped(dim, 2)
                memory = np.zeros((pages + 2, heads, groups, dim_groups, group, group_dim), array.dtype)
                cache = memory.transpose(0, 2, 4, 1, 3, 5)
            else:
                cache = np.zeros((pages + 2, heads, page_tokens, dim), array.dtype).transpose(0, 2, 1, 3)
            at = places(cache, np.arange(first_token, first_token + tokens), block_ids)
            cache[at] = array.reshape(cache[at].shape)
            sides.append(cache)
        caches.append((sides[0], sides[1]))
    return codec.PagedKV(caches, block_ids, tokens, first_token)


@given(
    layouts(), st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([1, 3, 16]), st.integers(0, 20), st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_pages_are_read_and_written_in_place(
    layout: codec.KVLayout, tokens: int, seed: int, page_tokens: int, first_token: int, tiles: bool
) -> None:
    kv = random_kv(layout, min(tokens, layout.chunk_tokens), seed)
    order = np.random.default_rng(seed)
    for quality in ("raw", "lossless", "high"):
        blob = codec.encode(kv, layout, quality=quality, first_position=7)
        assert codec.encode(paged(kv, layout, page_tokens, first_token, order, tiles), layout, quality=quality,
                            first_position=7) == blob  # fmt: skip
        for coder in (*NATIVE.values(), REFERENCE):
            empty = [(np.zeros_like(k), np.zeros_like(v)) for k, v in (kv if isinstance(kv, list) else map(tuple, kv))]
            out = paged(empty, layout, page_tokens, first_token, order, tiles)
            codec.decode(blob, layout, out=out, coder=coder)
            expected = paged(codec.decode(blob, layout), layout, page_tokens, first_token, np.random.default_rng(0))
            at = np.arange(first_token, first_token + out.tokens)
            for got, want in zip(out.caches, expected.caches, strict=True):
                for a, b in zip(got, want, strict=True):
                    left = a[places(a, at, out.block_ids)]
                    assert bits(left) == bits(b[places(b, at, expected.block_ids)])
                    assert (a != 0).sum() == (left != 0).sum(), "nothing outside the sequence is written"


@pytest.mark.parametrize("change", [{"block_ids": [0, 9]}, {"block_ids": [0]}, {"tokens": 40}, {"first_token": -1}])
def test_pages_that_do_not_hold_the_tokens_are_refused(change: dict[str, Any]) -> None:
    cache = np.zeros((3, 16, 2, 16), ml_dtypes.bfloat16)
    fits: dict[str, Any] = {"caches": [(cache, cache)] * 2, "block_ids": [2, 0], "tokens": 32, "first_token": 0}
    codec.encode(codec.PagedKV(**fits), UNIFORM)
    with pytest.raises(codec.LayoutError):
        codec.encode(codec.PagedKV(**(fits | change)), UNIFORM)


def test_step_trades_bits_for_error() -> None:
    kv = random_kv(UNIFORM, 64, 11)
    sizes, errors = [], []
    for step in (0.25, 1.0, 4.0):
        blob = codec.encode(kv, UNIFORM, quality="low", first_position=9, step=step)
        sizes.append(len(blob))
        errors.append(np.abs(codec.decode(blob, UNIFORM).astype(np.float64) - kv.astype(np.float64)).mean())
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    with pytest.raises(codec.LayoutError, match="step"):
        codec.encode(kv, UNIFORM, quality="low", step=0.0)
