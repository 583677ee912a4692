"""The chunk-hash chain: prefixes share, anything that changes the KV separates, every process agrees."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore_codec as codec

LAYOUT = codec.KVLayout.uniform(model="m", revision="r", num_layers=1, kv_heads=1, head_dim=8, chunk_tokens=16)
OTHER = codec.KVLayout.uniform(model="m", revision="r2", num_layers=1, kv_heads=1, head_dim=8, chunk_tokens=16)
tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def hashes(tokens: list[int], **arguments: object) -> list[bytes]:
    return [ref.hash for ref in codec.chunk_refs(LAYOUT, tokens, **arguments)]  # type: ignore[arg-type]


@given(tokens_lists, tokens_lists)
def test_prompts_share_exactly_their_common_chunks(one: list[int], other: list[int]) -> None:
    common = 0
    while common < min(len(one), len(other)) // 16 and one[: 16 * (common + 1)] == other[: 16 * (common + 1)]:
        common += 1
    shared = sum(a == b for a, b in zip(hashes(one), hashes(other), strict=False))
    assert shared == common


@given(tokens_lists)
def test_chain_shape(tokens: list[int]) -> None:
    refs = codec.chunk_refs(LAYOUT, tokens, tail=True)
    assert [ref.first_token for ref in refs] == list(range(0, len(tokens), 16))
    assert sum(ref.tokens for ref in refs) == len(tokens)
    assert all(later.parent == earlier.hash for earlier, later in itertools.pairwise(refs))
    assert codec.chunk_refs(LAYOUT, tokens) == [ref for ref in refs if ref.tokens == 16]


def test_what_changes_the_kv_changes_every_hash() -> None:
    tokens = list(range(48))
    variants = {
        "plain": hashes(tokens),
        "namespace": [ref.hash for ref in codec.chunk_refs(OTHER, tokens)],
        "tenant": hashes(tokens, tenant_key=b"k" * 32),
        "lora": hashes(tokens, extras=codec.Extras(lora="adapter")),
        "lora 2": hashes(tokens, extras=codec.Extras(lora="adapter-2")),
        "salt": hashes(tokens, extras=codec.Extras(salt="adapter")),
        "image": hashes(tokens, extras=codec.Extras(multimodal=(codec.MultimodalItem(0, 4, "d"),))),
        "image elsewhere": hashes(tokens, extras=codec.Extras(multimodal=(codec.MultimodalItem(1, 4, "d"),))),
        "other image": hashes(tokens, extras=codec.Extras(multimodal=(codec.MultimodalItem(0, 4, "e"),))),
        "engine": [ref.hash for ref in codec.wrap_engine_hashes(LAYOUT, hashes(tokens))],
    }
    flat = [digest for chain in variants.values() for digest in chain]
    assert len(set(flat)) == len(flat)
    assert hashes(tokens, extras=codec.Extras()) == variants["plain"]


def test_an_image_leaves_the_chunks_before_it_alone() -> None:
    tokens = list(range(48))
    with_image = hashes(tokens, extras=codec.Extras(multimodal=(codec.MultimodalItem(30, 4, "d"),)))
    plain = hashes(tokens)
    assert with_image[0] == plain[0]
    assert with_image[1] != plain[1]
    assert with_image[2] != plain[2]


def test_a_tail_is_not_a_full_chunk_and_its_length_counts() -> None:
    assert (
        codec.chunk_refs(LAYOUT, [7] * 15, tail=True)[0].hash != codec.chunk_refs(LAYOUT, [7] * 14, tail=True)[0].hash
    )
    assert hashes([0] * 16) != [codec.chunk_refs(LAYOUT, [0] * 15, tail=True)[0].hash]


@pytest.mark.parametrize("form", [list, np.array, lambda t: np.array(t, np.int64), lambda t: np.array(t, np.uint32)])
def test_token_types_agree(form: object) -> None:
    assert hashes(form(list(range(32)))) == hashes(list(range(32)))  # type: ignore[operator]


@pytest.mark.parametrize("tokens", [[-1] * 16, [2**32] * 16, [0.5] * 16, [[1] * 16], "x" * 16, [None] * 16])
def test_bad_tokens_are_refused(tokens: object) -> None:
    with pytest.raises(codec.LayoutError):
        codec.chunk_refs(LAYOUT, tokens)  # type: ignore[arg-type]


def test_weak_engine_hashes_and_short_keys_are_refused() -> None:
    assert len(codec.wrap_engine_hashes(LAYOUT, [bytes(16)])) == 1
    for length in (0, 8, 15):
        with pytest.raises(codec.LayoutError, match="sha256"):
            codec.wrap_engine_hashes(LAYOUT, [bytes(length)])
    with pytest.raises(codec.LayoutError, match="32 bytes"):
        codec.chunk_refs(LAYOUT, [1] * 16, tenant_key=b"short")


def test_processes_with_other_hash_seeds_agree() -> None:
    program = (
        "import kvstore_codec as c;"
        "l = c.KVLayout.uniform(model='m', revision='r', num_layers=1, kv_heads=1, head_dim=8, chunk_tokens=16);"
        "e = c.Extras(lora='a', salt='s', multimodal=(c.MultimodalItem(3, 4, 'd'), c.MultimodalItem(1, 1, 'x')));"
        "print(l.namespace_id.hex(), *(r.hash.hex() for r in c.chunk_refs(l, list(range(40)), extras=e, tail=True)))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(said) == 1
    assert len(said.pop().split()) == 4
