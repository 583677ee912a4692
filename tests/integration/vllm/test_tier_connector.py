"""`KVStoreOffloadingConnector`: whose KV the tier is given, by vLLM's own configuration, requests and block hashes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from polling import wait_until
from tiny_checkpoint import save
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request
from vllm_tier import MODULE, Host

from kvstore_client import InvalidArgument
from kvstore_client.integrations.vllm_tier import KVStoreOffloadingConnector
from kvstore_client.integrations.vllm_tier.connector import check_pages

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

LAYERS, HEADS, DIM, BLOCK, PAGES = 4, 4, 64, 16, 2
CHUNK = BLOCK * PAGES
PROMPT = list(range(3, 3 + 4 * CHUNK + 5))
NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        tmp_path_factory.mktemp("one") / "model", hidden_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS,
    )  # fmt: skip


def engine_config(folder: Path, address: str = "127.0.0.1:1", **changes: Any) -> Any:
    """vLLM's own configuration of an engine with such a model, as its core has it when connectors are made."""
    transfer = KVTransferConfig(
        kv_connector="KVStoreOffloadingConnector", kv_connector_module_path=MODULE, kv_role="kv_both",
        kv_connector_extra_config={
            "cpu_bytes_to_use": 1 << 22, "blocks_per_chunk": PAGES,
            "secondary_tiers": [
                {"type": "KVStoreTierManager", "module_path": MODULE, "address": address, "lookup_s": 10.0}
            ],
        },
    )  # fmt: skip
    arguments = {"model": str(folder), "dtype": "bfloat16", "block_size": BLOCK, "max_model_len": 512, **changes}
    config = EngineArgs(kv_transfer_config=transfer, **arguments).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # a GPU backend's
    return config


def cache_config(**changes: Any) -> KVCacheConfig:
    spec = FullAttentionSpec(
        **{"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": DIM, "dtype": torch.bfloat16, **changes}
    )
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(NAMES, spec)])


class Engine:
    """The scheduler's half of an engine with the connector. Closed by `close()`."""

    def __init__(self, folder: Path, address: str, **changes: Any) -> None:
        config = engine_config(folder, address, **changes)
        self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, cache_config())
        assert isinstance(self.connector, KVStoreOffloadingConnector)
        scheduler = self.connector.connector_scheduler
        self.host = Host(scheduler.manager.secondary_tiers[0]._offloading_spec.config, scheduler.manager)
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK, hash_function)
        self._scheduler, self._requests = scheduler, 0

    def request(self, **changes: Any) -> Request:
        self._requests += 1
        request = Request(
            f"r{self._requests}", PROMPT, SamplingParams(max_tokens=4), None, block_hasher=self._hasher, **changes
        )
        self.connector.on_new_request(request)
        return request

    def matched(self, request: Request) -> int:
        """Tokens that vLLM's scheduler is told can be loaded."""
        answers: list[int] = []

        def answered() -> bool:
            tokens, _ = self.connector.get_num_new_matched_tokens(request, 0)
            self.host.step()
            answers.extend([] if tokens is None else [tokens])
            return bool(answers)

        wait_until(answered, "the lookup is over", deadline_s=30)
        return answers[0]

    def store(self, request: Request, kv: Any) -> None:
        """As if it had computed the prompt's whole chunks."""
        assert self.matched(request) == 0
        status = self._scheduler._req_status[request.request_id]
        keys = status.group_states[0].offload_keys
        self.host.store(status.req_context, keys, kv)
        self.host.idle()

    def kv(self, request: Request) -> Any:
        status = self._scheduler._req_status[request.request_id]
        return self.host.kv(status.req_context, status.group_states[0].offload_keys)

    def close(self) -> None:
        self.connector.shutdown()


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Engines of one node."""
    node = NodeProcess(tmp_path)
    started: list[Engine] = []

    def start(folder: Path, **changes: Any) -> Engine:
        started.append(Engine(folder, node.address, **changes))
        return started[-1]

    yield start
    for engine in started:
        engine.close()
    node.kill()


def test_requests_of_another_engine_are_found_by_vllms_own_hashes(
    model_folder: Path, start_engine: Callable[..., Engine]
) -> None:
    writer = start_engine(model_folder)
    kv = random_kv(writer.host.tier_layout, 4 * CHUNK, 1)
    writer.store(writer.request(), kv)
    reader = start_engine(model_folder)
    request = reader.request()
    assert reader.matched(request) == 4 * CHUNK
    assert bits(reader.kv(request)) == bits(kv)
    # Nothing of another salt's, and nothing under the hashes of another algorithm.
    assert reader.matched(reader.request(cache_salt="somebody's")) == 0
    salted = writer.request(cache_salt="mine")
    writer.store(salted, np.flip(kv, 2))
    for salt, expected in (("mine", 4 * CHUNK), ("yours", 0)):
        assert reader.matched(reader.request(cache_salt=salt)) == expected
    assert bits(reader.kv(request)) == bits(kv)
    other = start_engine(model_folder, prefix_caching_hash_algo="sha256_cbor")
    assert other.matched(other.request()) == 0


def test_other_weights_under_the_same_name_share_nothing(
    tmp_path: Path, model_folder: Path, start_engine: Callable[..., Engine]
) -> None:
    copied = tmp_path / "two" / model_folder.name
    shutil.copytree(model_folder, copied)
    writer = start_engine(model_folder)
    kv = random_kv(writer.host.tier_layout, 4 * CHUNK, 1)
    writer.store(writer.request(), kv)
    same = start_engine(copied)
    assert same.matched(same.request()) == 4 * CHUNK, "the same files in another folder are the same weights"
    weights = next(copied.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    revised = start_engine(copied)
    assert revised.matched(revised.request()) == 0
    overridden = start_engine(model_folder, hf_overrides={"rms_norm_eps": 1e-3})
    assert overridden.matched(overridden.request()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.cache_config, "prefix_caching_hash_algo", "xxhash"), "set --prefix-caching-hash-algo to"),
        (lambda c: setattr(c, "lora_config", object()), "use KVStoreConnector, which reads its files"),
        (
            lambda c: c.kv_transfer_config.kv_connector_extra_config.update(secondary_tiers=[{"type": "fs"}]),
            "name a tier of kvstore",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_at_start(model_folder: Path, change: Callable[[Any], None], message: str) -> None:
    config = engine_config(model_folder)
    change(config)
    for role in (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER):
        with pytest.raises(InvalidArgument, match=message):
            KVStoreOffloadingConnector(config, role, cache_config())


def pages(layout: str, kernel_block: int | None = None) -> dict[str, torch.Tensor]:
    """The layers' pages as vLLM makes them for an accelerator."""
    spec = cache_config().kv_cache_groups[0].kv_cache_spec
    page = spec.page_size_bytes
    placed = KVCacheTensor(size=LAYERS * 8 * page, layers=NAMES, layer_stride=8 * page, block_stride=page)
    raw = torch.zeros(placed.size, dtype=torch.int8)
    made = create_kv_cache_views(raw, spec, 8, KVCacheLayout[layout], placed, kernel_block)
    return {name: view.view(torch.bfloat16) for name, view in zip(NAMES, made, strict=True)}


def packed(layer: Any, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """As FlashAttention in vLLM 0.32 writes: K and V of a token and head side by side."""
    for at, slot in enumerate(slots.tolist()):
        pages[slot // pages.shape[2], :, slot % pages.shape[2]] = torch.cat([k[at], v[at]], 1)


def transposed(layer: Any, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """As the CPU's attention: K transposed in the first half of a head's page."""
    halves = pages[0].view(HEADS, 2, -1)
    halves[:, 0].view(HEADS, DIM, BLOCK)[:] = k.permute(1, 2, 0)
    halves[:, 1].view(HEADS, BLOCK, DIM)[:] = v.transpose(0, 1)


def attention(update: Any, declared: str) -> Any:
    layer = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=update))
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(NAMES, layer)),
        cache_config=SimpleNamespace(kv_cache_layout=declared),
    )


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_pages_that_are_what_they_are_declared_to_be(layout: str) -> None:
    check_pages(attention(packed, layout), cache_config(), pages(layout))


@pytest.mark.parametrize(
    ("update", "declared", "actual", "kernel_block", "message"),
    [
        (transposed, "LBHNC", "LBHNC", None, "found=cpu-vec"),
        (packed, "LBNHC", "LBHNC", None, "do not lie as rows"),
        (packed, "BLHNC", "LBHNC", None, "set VLLM_KV_CACHE_LAYOUT to LBNHC or LBHNC"),
        (packed, "LBHNC", "LBHNC", 8, "no order that is known"),
        (lambda *_: None, "LBHNC", "LBHNC", None, "no order that is known"),
    ],
)  # fmt: skip
def test_pages_that_are_refused(
    update: Any, declared: str, actual: str, kernel_block: int | None, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_pages(attention(update, declared), cache_config(), pages(actual, kernel_block))
