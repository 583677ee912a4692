"""A model's folder as commands take it: a tiny random Llama with a tokenizer of one token a byte."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "mill", "stands", "at", "mouth", "of", "river", "and", "has", "two", "doors", "one", "for", "sea"]


def save(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """`folder`, with weights in bfloat16 that follow from a fixed seed; `changes` to the configuration."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tiny(model_type, vocab_size=len(alphabet), initializer_range=0.2, **changes)
    model.bfloat16().save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def prose(characters: int, seed: int) -> str:
    """Words in an order that follows from `seed`."""
    order = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += order.choice(WORDS) + order.choice(["  ", " ", ", ", ".\n"])
    return text[:characters]
