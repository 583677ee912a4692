"""What must not share KV has other namespaces or other chunk hashes; what may, has the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvstore_codec as codec
from kvstore_client import InvalidArgument, KVLayout, RoPE
from kvstore_client.integrations.vllm.identity import EngineFacts, RequestKey, digest_of, layout_of


def model_folder(path: Path, weights: bytes = b"weights") -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return str(path)


def llama(**changes: Any) -> SimpleNamespace:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return SimpleNamespace(**{"model_type": "llama", "rope_parameters": rope, **changes})


def facts(folder: str, **changes: Any) -> EngineFacts:
    return replace(
        EngineFacts(
            model=folder, revision=None, load_format="auto", dtype="bfloat16", config=llama(),
            overrides={"quantization": None, "hf_overrides": {}}, num_layers=4, kv_heads=2, head_dim=64,
        ),
        **changes,
    )  # fmt: skip


def layout(of: EngineFacts, revision: str | None = None) -> KVLayout:
    return layout_of(of, chunk_tokens=128, revision=revision)


def test_the_same_weights_elsewhere_are_the_same_namespace(tmp_path: Path) -> None:
    here, there = (model_folder(tmp_path / place / "model") for place in ("a", "b"))
    assert layout(facts(here)).namespace_id == layout(facts(there)).namespace_id
    assert layout(facts(here)).layers[0].rope == RoPE(10000.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"num_layers": 5},
        {"kv_heads": 1},
        {"config": llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})},
        {"config": llama(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0})},
        {"overrides": {"quantization": "fp8", "hf_overrides": {}}},
        {"overrides": {"quantization": None, "hf_overrides": {"rope_theta": 1.0}}},
    ],
)
def test_every_setting_that_changes_kv_is_another_namespace(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = model_folder(tmp_path / "model")
    assert layout(facts(folder)).namespace_id != layout(facts(folder, **changes)).namespace_id


def test_rotations_that_a_layout_cannot_name_are_told_apart_all_the_same(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    one, other = (
        layout(facts(folder, config=llama(rope_parameters={"rope_type": "yarn", "factor": factor})))
        for factor in (2.0, 4.0)
    )
    assert one.layers[0].rope is None
    assert one.namespace_id != other.namespace_id


def test_two_revisions_of_one_name_share_nothing(tmp_path: Path) -> None:
    old = layout(facts(model_folder(tmp_path / "old" / "model")))
    new = layout(facts(model_folder(tmp_path / "new" / "model", b"Weights")))
    assert old.model == new.model
    assert old.namespace_id != new.namespace_id
    said = layout(facts("org/model"), revision="one")
    assert said.namespace_id != layout(facts("org/model"), revision="two").namespace_id


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    before = digest_of(folder)
    model_folder(tmp_path / "model", b"other weights")
    assert digest_of(folder) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_format": "dummy"}, "weights loaded as 'dummy'"),
        ({"overrides": {"hf_overrides": print}}, "cannot be written down"),
    ],
)
def test_what_cannot_be_known_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        layout(facts(model_folder(tmp_path / "model"), **changes))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no weights"):
        layout(facts(str(tmp_path)))


def request(**changes: Any) -> SimpleNamespace:
    """With the fields of a vLLM request that decide its KV."""
    plain: dict[str, Any] = {
        "prompt_token_ids": [1, 2], "prompt_embeds": None, "resumable": False, "lora_request": None,
        "cache_salt": None, "mm_features": [],
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


def first_hash(of: SimpleNamespace) -> bytes:
    key = RequestKey.of(of)
    assert key is not None
    any_layout = KVLayout.uniform(model="m", revision="r", num_layers=1, kv_heads=1, head_dim=64, chunk_tokens=16)
    return codec.chunk_refs(any_layout, list(range(16)), extras=key.extras())[0].hash


def image(position: int, digest: str) -> SimpleNamespace:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=position, length=4), identifier=digest)


def test_adapters_salts_and_content_share_no_chunk(tmp_path: Path) -> None:
    paths = [model_folder(tmp_path / name, name.encode()) for name in ("one", "two")]
    adapters = [SimpleNamespace(lora_name=name, lora_path=path) for name in ("a", "b") for path in paths]
    hashes = [
        first_hash(each)
        for each in [
            request(),
            *(request(lora_request=adapter) for adapter in adapters),
            request(cache_salt="x"),
            request(cache_salt="y"),
            request(cache_salt="x", lora_request=adapters[0]),
            request(mm_features=[image(2, "cat")]),
            request(mm_features=[image(3, "cat")]),
            request(mm_features=[image(2, "dog")]),
        ]
    ]
    assert len(set(hashes)) == len(hashes)
    assert first_hash(request(cache_salt="x")) == hashes[5]


def test_an_adapter_that_changes_on_disk_is_another(tmp_path: Path) -> None:
    adapter = SimpleNamespace(lora_name="a", lora_path=model_folder(tmp_path / "a"))
    before = first_hash(request(lora_request=adapter))
    model_folder(tmp_path / "a", b"trained on")
    assert first_hash(request(lora_request=adapter)) != before


@pytest.mark.parametrize("changes", [{"prompt_token_ids": None}, {"prompt_embeds": object()}, {"resumable": True}])
def test_prompts_that_are_not_tokens_have_no_key(changes: dict[str, Any]) -> None:
    assert RequestKey.of(request(**changes)) is None
