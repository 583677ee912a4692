"""What `bench.planner` asks of every contestant: a prompt of a model, a link, a deadline."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.planner_links import Link, links
from kvstore_client.planner.choose import Chunk
from kvstore_client.planner.controller import Task
from kvstore_client.planner.costs import PrefillCost
from kvstore_client.planner.estimates import DECODE_PRIORS
from kvstore_client.planner.sizes import LayerSizes
from kvstore_codec import Quality

CHUNK_TOKENS = 256
QUESTION_TOKENS = 64  # behind the stored context; computed by everybody
CONTEXTS = (2048, 8192, 32768)
#: Deadlines, as shares of the time that recomputing takes.
DEADLINES = (0.1, 0.25, 0.5, 1.5)
LATENCIES_S = (0.0002, 0.02)
#: Bits an element (docs/performance.md).
HIGH_BITS, LOSSLESS_BITS = 5.91, 10.57
#: A chunk's layers are not exactly what the planner expects: shares of theirs, normal.
_SIZE_SIGMA = 0.05
#: The decoder is slower than the planner's prior.
DECODE_FACTOR = 0.8
DECODE_THREADS = 4


@dataclass(frozen=True)
class Model:
    """A dense transformer on an engine. `flops`: of its prefill, achieved (peak × utilisation); elements of KV a token
    are 2 × layers × kv_heads × head_dim."""

    name: str
    engine: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    flops: float

    @property
    def elements_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def cost(self) -> PrefillCost:
        rate = self.flops / (2 * self.parameters)  # at the first tokens: attention is yet to come
        return PrefillCost.of_model(
            rate, parameters=self.parameters, layers=self.layers, heads=self.heads, head_dim=self.head_dim,
            measured_tokens=1,
        )  # fmt: skip


#: Two cores prefill SmolLM2 at about 1,000 tokens/s (measured); GPUs: dense bf16 peak of the data sheet × utilisation.
MODELS = (
    Model("SmolLM2-135M", "2 CPU cores", 135e6, 30, 9, 3, 64, 1000 * 2 * 135e6),
    Model("Llama-3.2-1B", "L4 at 40 %", 1.24e9, 16, 32, 8, 64, 0.4 * 121e12),
    Model("Llama-3.1-8B", "A100 at 50 %", 8.03e9, 32, 32, 8, 128, 0.5 * 312e12),
    Model("Llama-3.1-70B", "4 H100 at 45 %", 70.6e9, 80, 64, 8, 128, 4 * 0.45 * 989e12),
)


@dataclass(frozen=True)
class Case:
    """`task` has sizes as the planner expects them; `size_bytes` has them as they are, by chunk."""

    model: Model
    context: int
    share: float
    link: Link
    task: Task
    size_bytes: Sequence[dict[Quality, float]]

    @property
    def recompute_s(self) -> float:
        return self.task.recompute_s[0]

    @property
    def deadline_s(self) -> float:
        return self.task.ttft_s

    def decode_s(self, index: int, quality: Quality) -> float:
        rate = DECODE_FACTOR * DECODE_THREADS * DECODE_PRIORS[quality]
        return self.task.chunks[index].elements / rate


def cases(seed: int, walks: int) -> Iterator[Case]:
    for model in MODELS:
        for context in CONTEXTS:
            for share in DEADLINES:
                task, sizes = _task(model, context, share, seed)
                for latency_s in LATENCIES_S:
                    for link in links(task.ttft_s, latency_s, seed, walks):
                        yield Case(model, context, share, link, task, sizes)


def _task(model: Model, context: int, share: float, seed: int) -> tuple[Task, list[dict[Quality, float]]]:
    rng = random.Random(f"{seed} {model.name} {context}")
    elements = CHUNK_TOKENS * model.elements_per_token
    stored = round(elements * HIGH_BITS / 8)
    expected = LayerSizes().choices(Quality.HIGH, stored, Quality.RAW, Quality.LOW)
    chunks = [Chunk(first, CHUNK_TOKENS, elements, expected) for first in range(0, context, CHUNK_TOKENS)]
    sizes = []
    for _ in chunks:
        real: dict[Quality, float] = {quality: size * rng.gauss(1, _SIZE_SIGMA) for quality, size in expected.items()}
        sizes.append(real | {Quality.HIGH: stored, Quality.LOSSLESS: elements * LOSSLESS_BITS / 8})
    tokens = context + QUESTION_TOKENS
    starts = [*(chunk.first_token for chunk in chunks), context]
    recompute_s = [model.cost(first, tokens) for first in starts]
    return Task(chunks, recompute_s, tokens, share * recompute_s[0]), sizes
