"""Time to first token of a real vLLM engine (SmolLM2, CPU) by the store that it is given, and what ours costs a step.

An engine for each store (see vllm_contestants; "none": no store). Each prompt is asked for four times: *cold*, when
nobody has it; *native*, when the engine's own prefix cache has it; *warm*, when that has been reset and the store has
it; *restart*, in an engine that has just been started, with the store still there. All but the first restore the same
tokens, in the same blocks, and must generate the same. Prompts share no block; the engines take turns, one at a time.

Run it with `make vllm-bench`, which gives an engine a node and another one a sidecar; with the stores of others, after
`make vllm-rivals`: STORES='node sidecar none lmcache mooncake' make vllm-bench.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, DTYPE, EngineProcess

from bench.vllm_contestants import CONTESTANTS, Contestant
from kvstore.demo import model

ANSWER_TOKENS = 8
SETTLE_S = 3.0  # for stores that do not tell when they have stored
E = TypeVar("E")
Asked = dict[str, list[dict[str, Any]]]  # way → of each prompt: "seconds", "tokens", "restored"


def prompts_of(count: int, tokens: int) -> list[list[int]]:
    """Of `tokens` tokens each, no block of one in another."""
    encode = AutoTokenizer.from_pretrained(model.model_folder(CACHE)).encode
    return [encode(f"{number}. " + TEXT * (tokens // 500 + 1))[:tokens] for number in range(count)]


class Engine:
    """One contestant's, and what it answered."""

    def __init__(self, folder: Path, name: str, contestant: Contestant) -> None:
        self.name, self.contestant, self._folder = name, contestant, folder
        self.answers: Asked = defaultdict(list)
        self._saved = 0
        self._process = self._started()

    def ask(self, way: str, prompt: Sequence[int]) -> None:
        answer = self._process.generate([prompt], ANSWER_TOKENS)
        self.answers[way].append({
            "seconds": answer["first_token_s"][0], "tokens": answer["tokens"][0], "restored": answer["cached"][0]
        })  # fmt: skip

    def forget(self, tokens: int) -> None:
        """Its own prefix cache, when the store has the last prompt, of so many tokens in whole blocks."""
        if self.contestant.is_ours:
            self._saved += tokens
            self._process.wait_saved(self._saved)
        else:
            threading.Event().wait(SETTLE_S)
        assert self._process.reset(), f"{self.name}: blocks are still in use"

    def hooks(self) -> dict[str, dict[str, float]]:
        return self._process.hooks()

    def why_not(self) -> dict[str, float]:
        """What the connector has counted since the engine was started that explains loads that were not made."""
        telling = ("kvstore_vllm_lookups", "kvstore_vllm_plans", "kvstore_vllm_computes", "kvstore_vllm_short_loads")
        return {name: count for name, count in self._process.counters().items() if name.startswith(telling)}

    def restart(self) -> None:
        self._process.stop()
        self._process = self._started()

    def kill(self) -> None:
        self._process.kill()

    def _started(self) -> EngineProcess:
        log = self._folder / f"engine-{len(self.answers)}.log"
        return EngineProcess(log, self.contestant.transfer, environment=self.contestant.environment)


def measured(folder: Path, stores: Sequence[str], rounds: int, tokens: int, quality: str) -> dict[str, Any]:
    prompts = prompts_of(rounds + 1, tokens)  # the first is to warm up
    blocks = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    with contextlib.ExitStack() as ending:
        engines = []
        for name in stores:
            (own := folder / name).mkdir()
            contestant = ending.enter_context(CONTESTANTS[name](own, quality))
            engines.append(Engine(own, name, contestant))
            ending.callback(engines[-1].kill)
        for number, prompt in enumerate(prompts):
            for engine in turned(engines, number):
                engine.ask("cold", prompt)
                engine.ask("native", prompt)
                if engine.contestant.transfer is not None:
                    engine.forget(blocks)
                    engine.ask("warm", prompt)
        hooks = {engine.name: engine.hooks() for engine in engines if engine.contestant.is_ours}
        for engine in engines:
            if engine.contestant.transfer is not None:
                engine.restart()
        for number, prompt in enumerate(prompts):
            for engine in turned(engines, number):
                if engine.contestant.transfer is not None:
                    engine.ask("restart", prompt)
        restored = (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        problems = [problem for engine in engines for problem in problems_of(engine, restored, quality)]
    return {
        "problems": problems, "dtype": DTYPE, "tokens": tokens, "rounds": rounds, "quality": quality, "hooks": hooks,
        "answers": {
            engine.name: {way: answers[1:] for way, answers in engine.answers.items()} for engine in engines
        },
    }  # fmt: skip


def turned(engines: Sequence[E], number: int) -> list[E]:
    """Another one begins each time, and they go round the other way every other time: what one leaves behind, threads
    that spin say, does not always meet the same one."""
    turned = [*engines[number % len(engines) :], *engines[: number % len(engines)]]
    return turned if number % 2 == 0 else turned[::-1]


def problems_of(engine: Engine, restored: int, quality: str) -> list[str]:
    """Ours restores all that the engine's own cache does, and the same; of others the table says what they restored."""
    native = engine.answers["native"]
    assert [each["restored"] for each in native] == [restored] * len(native)
    if not engine.contestant.is_ours:
        return []
    problems = []
    for way in ("warm", "restart"):
        for number, (answer, exact) in enumerate(zip(engine.answers[way], native, strict=True)):
            what = f"{engine.name}, {way}, prompt {number}"
            if answer["restored"] != restored:
                problems.append(f"{what}: {answer['restored']} tokens restored; {engine.why_not()}")
            if quality == "lossless" and answer["tokens"] != exact["tokens"]:
                problems.append(f"{what}: other tokens")
    return problems


def show(found: Mapping[str, Any]) -> None:
    print(f"{found['tokens']} tokens, {found['rounds']} prompts, {found['dtype']}, {found['quality']}\n")
    print("| store | | TTFT s (median) | least | most | cold ÷ this | restored | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for store, answers in found["answers"].items():
        cold = statistics.median(each["seconds"] for each in answers["cold"])
        for way, all_of_way in answers.items():
            seconds = [each["seconds"] for each in all_of_way]
            same = sum(
                one["tokens"] == exact["tokens"] for one, exact in zip(all_of_way, answers["native"], strict=True)
            )
            median, restored = statistics.median(seconds), statistics.median(each["restored"] for each in all_of_way)
            print(f"| {store} | {way} | {median:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {cold / median:.1f} "
                  f"| {restored:.0f} | {same} of {len(seconds)} |")  # fmt: skip
    for store, hooks in found["hooks"].items():
        print(f"\n| {store}: hook, while a load is under way | calls | median µs | p99 µs | most µs |")
        print("|---|---|---|---|---|")
        for name, each in hooks.items():
            print(f"| {name} | {each['calls']} | {each['p50_us']:.1f} | {each['p99_us']:.1f} | {each['max_us']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", choices=CONTESTANTS, default=["node", "sidecar", "none"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1600)
    parser.add_argument("--quality", default="lossless")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), given.stores, given.rounds, given.tokens, given.quality)
    show(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    if found["problems"]:
        raise SystemExit("\n".join(("", *found["problems"])))


if __name__ == "__main__":
    main()
