"""Time to first token of a real vLLM engine (SmolLM2, CPU) with kvstore's connector, and what its hooks cost.

Each prompt is asked for four times: *cold*, when nobody has it; *native*, when the engine's own prefix cache has it;
*kvstore*, when that has been reset; *restart*, in an engine that has just been started, with the node still there. All
but the first restore the same tokens, in the same blocks, and must generate the same. With `--plain` an engine without
connector computes the prompts too. Prompts share no block, and take turns.

Run it with `make vllm-bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from node_process import NodeProcess
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, DTYPE, EngineProcess, kv_transfer

from kvstore.demo import model

ANSWER_TOKENS = 8


def prompts_of(count: int, tokens: int) -> list[list[int]]:
    """Of `tokens` tokens each, no block of one in another."""
    encode = AutoTokenizer.from_pretrained(model.model_folder(CACHE)).encode
    return [encode(f"{number}. " + TEXT * (tokens // 500 + 1))[:tokens] for number in range(count)]


def asked(engine: EngineProcess, prompt: list[int]) -> tuple[float, list[int], int]:
    """(seconds to the first token, tokens, tokens restored)."""
    answer = engine.generate([prompt], ANSWER_TOKENS)
    return answer["first_token_s"][0], answer["tokens"][0], answer["cached"][0]


def measured(folder: Path, rounds: int, tokens: int, quality: str, plain: bool) -> dict[str, Any]:
    prompts = prompts_of(rounds + 1, tokens)  # the first is to warm up
    restored = (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    seconds: dict[str, list[float]] = {name: [] for name in ("cold", "native", "kvstore", "restart")}
    answers: list[list[int]] = []
    node = NodeProcess(folder)
    engines: list[EngineProcess] = []
    try:
        transfer = kv_transfer(node.address, quality=quality)
        engines.append(EngineProcess(folder / "first.log", transfer))
        for number, prompt in enumerate(prompts):
            for way in ("cold", "native", "kvstore"):
                if way == "kvstore":
                    engines[0].wait_saved((number + 1) * (tokens // BLOCK_TOKENS * BLOCK_TOKENS))
                    engines[0].reset()
                first_s, answer, cached = asked(engines[0], prompt)
                assert cached == (0 if way == "cold" else restored), (way, cached)
                if way == "native":
                    answers.append(answer)
                assert way != "kvstore" or quality != "lossless" or answer == answers[-1], "other tokens"
                seconds[way].append(first_s)
        hooks = engines[0].hooks()
        engines[0].stop()
        engines.append(EngineProcess(folder / "second.log", transfer))
        for prompt, expected in zip(prompts, answers, strict=True):
            first_s, answer, cached = asked(engines[1], prompt)
            assert cached == restored
            assert quality != "lossless" or answer == expected, "other tokens"
            seconds["restart"].append(first_s)
        engines[1].stop()
        if plain:
            engines.append(EngineProcess(folder / "plain.log", None))
            seconds["plain"] = [asked(engines[2], prompt)[0] for prompt in prompts]
    finally:
        for engine in engines:
            engine.kill()
        node.kill()
    return {
        "dtype": DTYPE, "tokens": tokens, "restored": restored, "rounds": rounds, "quality": quality, "hooks": hooks,
        "seconds": {way: measured_s[1:] for way, measured_s in seconds.items()},
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    cold = statistics.median(found["seconds"]["cold"])
    print(f"{found['tokens']} tokens, {found['restored']} restored, {found['rounds']} prompts")
    print(f"{found['dtype']}, {found['quality']}\n")
    print("| | TTFT s (median) | least | most | cold ÷ this |\n|---|---|---|---|---|")
    for way, seconds in found["seconds"].items():
        median = statistics.median(seconds)
        print(f"| {way} | {median:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {cold / median:.1f} |")
    print("\n| hook, while a load is under way | calls | median µs | p99 µs | most µs |\n|---|---|---|---|---|")
    for name, each in found["hooks"].items():
        print(f"| {name} | {each['calls']} | {each['p50_us']:.1f} | {each['p99_us']:.1f} | {each['max_us']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1600)
    parser.add_argument("--quality", default="lossless")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), given.rounds, given.tokens, given.quality, given.plain)
    show(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
