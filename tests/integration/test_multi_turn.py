"""Prompts that grow, change in the middle or share a document: the store gives back all that has not changed, is sent
nothing twice, and the model says what it would say without it.

In float32, where a prefill in pieces and one in a single piece differ by 1e-5 in their logits, so that the tokens of
both can be compared; in bfloat16 they may part at a near-tie. On the same pieces, with a cache that never left the
process, every bit is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from node_process import NodeProcess
from prometheus_client import CollectorRegistry
from smollm2 import TEXT

from kvstore_client import Client, Extras, InvalidArgument, Namespace, PutResult
from kvstore_client.integrations.transformers import kv_from_cache, layout_for, passed_cache, returned_cache
from kvstore_client.integrations.transformers_turn import Turn
from kvstore_codec import KVLayout, Quality

pytestmark = pytest.mark.model
StartNode = Callable[..., NodeProcess]
CHUNK = 32
ANSWER = 4  # tokens
DEADLINE_S = 60.0


class Worker:
    """An engine with a store: a client of its own, so that `sent` is what it has sent."""

    def __init__(
        self, model: Any, layout: KVLayout, address: str, *, salt: str = "", deadline_s: float = DEADLINE_S
    ) -> None:  # fmt: skip
        self.model, self._registry = model, CollectorRegistry()
        self._client = Client(address, deadline=deadline_s, registry=self._registry)
        self.store: Namespace = self._client.namespace(layout, extras=Extras(salt=salt) if salt else None)

    @property
    def sent(self) -> int:
        return int(self._registry.get_sample_value("kvstore_client_stream_bytes_total", {"direction": "out"}) or 0)

    def close(self) -> None:
        self._client.close()

    def turn(self, tokens: Sequence[int], **how: Any) -> tuple[Turn, list[int]]:
        """(the turn, prompt and answer)."""
        turn = Turn(self.store, self.model, tokens, **how)
        return turn, greedy(self.model, tokens, turn.cache)

    def keep(self, turn: Turn, tokens: Sequence[int]) -> PutResult:
        """As `lossless`, with everything that was sent accounted for."""
        before = self.sent
        kept = turn.keep(tokens, quality="lossless")
        assert (kept.rejected, kept.reasons) == (0, ())
        assert self.sent - before == kept.bytes
        return kept


def greedy(model: Any, tokens: Sequence[int], cache: Any = None) -> list[int]:
    """The prompt and the ANSWER tokens that the model goes on with, on top of `cache` or of nothing."""
    ids = torch.tensor([tokens])
    past = passed_cache(model, cache) if cache is not None else {}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER, **past
    )
    return out[0].tolist()  # type: ignore[no-any-return]


def whole_chunks(tokens: int) -> int:
    return tokens // CHUNK * CHUNK


@pytest.fixture(scope="module")
def model(smollm2: tuple[Any, Any]) -> Any:
    return copy.deepcopy(smollm2[0]).float()


@pytest.fixture(scope="module")
def text(smollm2: tuple[Any, Any]) -> list[int]:
    return smollm2[1](TEXT).input_ids  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def layout(model: Any) -> KVLayout:
    return layout_for(model, chunk_tokens=CHUNK, revision="multi-turn")


@pytest.fixture(scope="module")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    node = NodeProcess(tmp_path_factory.mktemp("node"), "--host-capacity", "256MiB")
    yield node
    node.kill()


@pytest.fixture
def start_worker(
    model: Any, layout: KVLayout, shared_node: NodeProcess, request: pytest.FixtureRequest
) -> Iterator[Callable[[], Worker]]:
    """Workers that share what is stored with each other and with no other test."""
    workers: list[Worker] = []

    def start() -> Worker:
        workers.append(Worker(model, layout, shared_node.address, salt=request.node.name))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_a_conversation_sends_each_chunk_once(
    model: Any, text: list[int], start_worker: Callable[[], Worker]
) -> None:  # fmt: skip
    tokens: list[int] = []
    said, local = 0, None  # local: the cache of an engine that keeps the whole conversation in its own memory
    for message in (100, 40, 40):  # tokens of what the user says in each turn
        tokens = tokens + text[said : said + message]
        said += message
        worker = start_worker()  # each turn may go to another machine
        stored_before = whole_chunks(len(tokens) - message - 1) if local is not None else 0
        turn, answered = worker.turn(tokens)
        assert turn.reused == stored_before
        assert turn.provenance == Quality.RAW
        assert answered == greedy(model, tokens), "as a fresh prefill"
        if local is not None:
            local.crop(turn.reused - local.get_seq_length())
        ids = torch.tensor([answered[: turn.cache.get_seq_length()]])
        local = _in_the_same_pieces(model, ids, len(tokens), local)
        for stored, kept in zip(turn.cache.layers, local.layers, strict=True):
            assert torch.equal(stored.keys, kept.keys)
            assert torch.equal(stored.values, kept.values)

        kept = worker.keep(turn, answered)
        assert kept.tokens == whole_chunks(len(answered) - 1)  # the last token's KV was not computed
        assert (kept.stored, kept.have) == ((kept.tokens - stored_before) // CHUNK, 0)
        assert worker.store.lookup(answered).tokens == kept.tokens
        tokens = answered


def _in_the_same_pieces(model: Any, ids: Any, prompt_tokens: int, local: Any) -> Any:
    """The cache of all of `ids` behind `local`: the prompt's rest in one piece, the answer token by token."""
    start = local.get_seq_length() if local is not None else 0
    past = passed_cache(model, local) if local is not None else {"use_cache": True}
    local = returned_cache(model(ids[:, start:prompt_tokens], **past))
    for position in range(prompt_tokens, ids.shape[1]):
        local = returned_cache(model(ids[:, position : position + 1], **passed_cache(model, local)))
    return local


def test_an_edit_in_the_middle_keeps_what_is_before_it(
    model: Any, text: list[int], start_worker: Callable[[], Worker]
) -> None:  # fmt: skip
    worker = start_worker()
    original = text[:110]
    turn, answered = worker.turn(original)
    first = worker.keep(turn, answered)
    edited = [*original[:70], *text[300:305], *original[73:]]
    assert worker.store.lookup(edited).tokens == 64
    turn, changed = worker.turn(edited)
    assert turn.reused == 64
    assert changed == greedy(model, edited)
    kept = worker.keep(turn, changed)
    assert (kept.tokens, kept.stored, kept.have) == (96, 1, 0)
    assert worker.store.lookup(answered).tokens == first.tokens, "the prompt before the edit is still there"
    again, same = start_worker().turn(edited)
    assert (again.reused, same) == (96, changed)


def test_a_document_under_another_question(
    model: Any, text: list[int], start_worker: Callable[[], Worker]
) -> None:  # fmt: skip
    worker = start_worker()
    document, questions = text[:75], (text[400:410], text[450:465])
    turn, answered = worker.turn([*document, *questions[0]])
    worker.keep(turn, answered)
    prompt = [*document, *questions[1]]
    turn, answered = start_worker().turn(prompt)
    assert turn.reused == whole_chunks(len(document))
    assert answered == greedy(model, prompt)


def test_a_crawl_that_appends_computes_and_sends_what_is_new(
    model: Any, text: list[int], start_worker: Callable[[], Worker]
) -> None:  # fmt: skip
    worker, sent = start_worker(), 0
    for length in (40, 70, 128):
        tokens = text[:length]
        turn = Turn(worker.store, model, tokens)
        model(torch.tensor([tokens[turn.reused :]]), **turn.passed, logits_to_keep=1)
        new = (whole_chunks(length) - turn.reused) // CHUNK
        if length < 128:
            kept = worker.keep(turn, tokens)
            assert (kept.stored, kept.have) == (new, 0)
        else:  # a put of everything reads all of the KV, and sends no more
            kept = worker.store.put(tokens, kv_from_cache(turn.cache, worker.store.layout), quality="lossless")
            assert (kept.stored, kept.have) == (new, turn.reused // CHUNK)
        assert kept.tokens == whole_chunks(length)
        sent += kept.bytes
        assert worker.sent == sent
    lookup = worker.store.lookup(text)
    assert lookup.tokens == 128
    assert sum(chunk.stored_bytes for chunk in lookup.chunks) == sent
    # All of the prompt is stored: its last token is computed, and its last chunk is held already.
    turn, answered = worker.turn(text[:128])
    assert turn.reused == 127
    assert answered == greedy(model, text[:128])
    kept = worker.keep(turn, answered)
    assert (kept.stored, kept.have, kept.tokens) == (0, 1, 128)


def test_what_is_computed_on_a_lossy_prefix_says_so(
    model: Any, text: list[int], start_worker: Callable[[], Worker]
) -> None:  # fmt: skip
    worker = start_worker()

    def computed(tokens: list[int], **how: Any) -> Turn:
        turn = Turn(worker.store, model, tokens, **how)
        model(torch.tensor([tokens[turn.reused :]]), **turn.passed, logits_to_keep=1)
        return turn

    computed(text[:70]).keep(text[:70], quality="high")
    turn = computed(text[:100], quality="medium")
    assert (turn.reused, turn.provenance) == (64, Quality.MEDIUM)
    worker.keep(turn, text[:100])
    chunks = worker.store.lookup(text[:100]).chunks
    assert [(chunk.quality, chunk.provenance) for chunk in chunks] == [
        (Quality.HIGH, Quality.RAW), (Quality.HIGH, Quality.RAW), (Quality.LOSSLESS, Quality.MEDIUM),
    ]  # fmt: skip
    for floor, reused, provenance in (("lossless", 0, "raw"), ("high", 64, "high"), ("low", 96, "medium")):
        turn = Turn(worker.store, model, text[:100], min_quality=floor)
        assert (turn.reused, turn.provenance) == (reused, Quality.parse(provenance))


def test_without_a_node_a_turn_is_an_ordinary_one(
    model: Any, text: list[int], layout: KVLayout, start_node: StartNode
) -> None:  # fmt: skip
    node = start_node()
    worker = Worker(model, layout, node.address, deadline_s=2.0)
    node.kill()
    turn, answered = worker.turn(text[:40])
    assert (turn.reused, answered) == (0, greedy(model, text[:40]))
    kept = turn.keep(answered)
    assert (kept.stored, kept.rejected) == (0, 1)
    worker.close()


def test_misuse_is_named(model: Any, text: list[int], start_worker: Callable[[], Worker]) -> None:
    store = start_worker().store
    with pytest.raises(InvalidArgument, match="at least one token"):
        Turn(store, model, [])
    turn = Turn(store, model, text[:40])
    with pytest.raises(InvalidArgument, match="nothing was computed"):
        turn.keep(text[:40])
    model(torch.tensor([text[:40]]), **turn.passed)
    with pytest.raises(InvalidArgument, match="more than these tokens"):
        turn.keep(text[:39])
