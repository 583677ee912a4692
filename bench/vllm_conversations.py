"""Conversations over two vLLM servers (SmolLM2, CPU) that share KV through one node: hit rate, TTFT, right answers.

Eight conversations at a time, each of several turns: a turn's prompt is all that was said before and a new question,
and goes to either server. So what one has computed, and generated, the other loads. After its last turn a conversation
is followed by a new one. Afterwards a third engine, of its own, with prefix caching and the same blocks, is told the
same conversations, and must give the same answers.

In float32, where prompts that are computed in other pieces give the same tokens but for the rarest near-tie; `--dtype
bfloat16` counts them. Run it with `make vllm-conversations MINUTES=5`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from node_process import NodeProcess
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer
from vllm_server import Completion, Server

from kvstore.demo import model

CONVERSATIONS = 8
SYSTEM_TOKENS = 2 * BLOCK_TOKENS + 30  # that all conversations begin with
QUESTION_TOKENS = 90
ANSWER_TOKENS = 24
TURNS = 6
LOOKUP_S = 2.0


@dataclass
class Turn:
    """`held`: tokens of its prompt, in whole blocks, that some engine has computed before."""

    prompt: int
    held: int
    server: int
    answer: Completion


@dataclass
class Conversation:
    number: int
    tokens: list[int]
    turns: list[Turn] = field(default_factory=list)


class Talk:
    """All conversations start with the same text; each turn's question comes from a conversation's own number."""

    def __init__(self, seed: int) -> None:
        self._text = AutoTokenizer.from_pretrained(model.model_folder(CACHE))(TEXT * 2).input_ids
        self._seed = seed

    def begun(self, number: int) -> Conversation:
        return Conversation(number, list(self._text[:SYSTEM_TOKENS]))

    def question(self, number: int, turn: int) -> list[int]:
        rng = random.Random(f"{self._seed} {number} {turn}")
        start = rng.randrange(SYSTEM_TOKENS, len(self._text) - QUESTION_TOKENS)
        return list(self._text[start : start + QUESTION_TOKENS])


def held(conversation: Conversation) -> int:
    """Tokens of its next prompt, in whole blocks, that were computed before: all but the last one generated, and what
    every conversation begins with."""
    return (len(conversation.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def converse(talk: Talk, servers: Sequence[Server], line: int, until_s: float) -> list[Conversation]:
    """One conversation after the other, until the time is over."""
    done: list[Conversation] = []
    rng = random.Random(line)
    while time.monotonic() < until_s:
        conversation = talk.begun(line + CONVERSATIONS * len(done))
        done.append(conversation)
        for turn in range(TURNS):
            before = held(conversation)
            conversation.tokens += talk.question(conversation.number, turn)
            server = rng.randrange(len(servers))
            answer = servers[server].complete(conversation.tokens, ANSWER_TOKENS)
            conversation.turns.append(Turn(len(conversation.tokens), before, server, answer))
            conversation.tokens += answer.tokens
            if time.monotonic() > until_s:
                break
    return done


def wrong_answers(folder: Path, talk: Talk, conversations: Sequence[Conversation], dtype: str) -> int:
    """Turns that an engine of its own answers otherwise, with the conversation as it was: several at a time, turn by
    turn."""
    engine = EngineProcess(folder / "reference.log", None, dtype=dtype)
    wrong = 0
    try:
        for start in range(0, len(conversations), CONVERSATIONS):
            some = conversations[start : start + CONVERSATIONS]
            said = {each.number: talk.begun(each.number).tokens for each in some}
            for turn in range(TURNS):
                going_on = [each for each in some if turn < len(each.turns)]
                if not going_on:
                    break
                for each in going_on:
                    said[each.number] += talk.question(each.number, turn)
                answers = engine.generate([said[each.number] for each in going_on], ANSWER_TOKENS)["tokens"]
                for each, answer in zip(going_on, answers, strict=True):
                    wrong += answer != each.turns[turn].answer.tokens
                    said[each.number] += each.turns[turn].answer.tokens
    finally:
        engine.kill()
    return wrong


def measured(folder: Path, minutes: float, seed: int, dtype: str, with_store: bool) -> dict[str, Any]:
    talk, servers = Talk(seed), []
    node = NodeProcess(folder, "--host-capacity", "4GiB")
    try:
        transfer = kv_transfer(node.address, lookup_s=LOOKUP_S) if with_store else None
        servers = [Server(folder / f"server-{number}.log", transfer, dtype=dtype) for number in range(2)]
        for server in servers:
            server.wait_ready()
            server.complete(talk.question(-1, 0), 2)  # warms it up
        until_s = time.monotonic() + 60 * minutes
        with ThreadPoolExecutor(CONVERSATIONS) as threads:
            lines = [threads.submit(converse, talk, servers, line, until_s) for line in range(CONVERSATIONS)]
            conversations = [each for line in lines for each in line.result()]
    finally:
        for server in servers:
            server.kill()
        node.kill()
    turns = [turn for conversation in conversations for turn in conversation.turns]
    return {
        "minutes": minutes, "dtype": dtype, "store": with_store, "conversations": len(conversations),
        "turns": len(turns), "prompt_tokens": sum(turn.prompt for turn in turns),
        "cached_tokens": sum(turn.answer.cached for turn in turns), "held_tokens": sum(turn.held for turn in turns),
        "wrong": wrong_answers(folder, talk, conversations, dtype),
        "first_s": [turn.answer.first_s for turn in turns], "all_s": [turn.answer.all_s for turn in turns],
        "turns_of_all": [[asdict(turn) for turn in conversation.turns] for conversation in conversations],
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    print(f"{found['conversations']} conversations, {found['turns']} turns in {found['minutes']:g} minutes, "
          f"{CONVERSATIONS} at a time over two servers, {found['dtype']}, store: {found['store']}")  # fmt: skip
    prompt, cached, held_before = found["prompt_tokens"], found["cached_tokens"], found["held_tokens"]
    print(f"{prompt:,} tokens of prompts, {cached / prompt:.1%} restored; "
          f"of the {held_before:,} in blocks computed before {cached / held_before:.1%}")  # fmt: skip
    print("\n| | p50 s | p90 s | p99 s | most s |\n|---|---|---|---|---|")
    for name, label in (("first_s", "first token"), ("all_s", f"all {ANSWER_TOKENS} tokens")):
        cuts = statistics.quantiles(found[name], n=100, method="inclusive")
        print(f"| {label} | {cuts[49]:.2f} | {cuts[89]:.2f} | {cuts[98]:.2f} | {max(found[name]):.2f} |")
    print(f"\n{found['wrong']} answers other than the reference's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=20261)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--without-store", action="store_true", help="servers with their own prefix caches alone")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), given.minutes, given.seed, given.dtype, not given.without_store)
    show(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    sys.exit(found["wrong"] > 0 and given.dtype == "float32")


if __name__ == "__main__":
    main()
