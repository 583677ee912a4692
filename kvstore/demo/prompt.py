"""What the demo's model reads: a document that is shipped here, and a question about it.

`document.txt` is the United States Declaration of Independence (1776), which is in the public domain.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from kvstore_client import Extras

QUESTION = "In your own words: what does this document declare, and which three complaints weigh most in it?"
CONTINUATION_TOKENS = 64
CHUNK_TOKENS = 256
#: What is put, and the qualities that are read from it: one lossy object holds three.
READ_FROM = {"raw": ("raw",), "lossless": ("lossless",), "high": ("high", "medium", "low")}


def prompt_tokens(tokenizer: Any) -> list[int]:
    """Token ids of document and question in the model's chat format."""
    document = resources.files("kvstore.demo").joinpath("document.txt").read_text("utf-8")
    messages = [{"role": "user", "content": f"{document}\n\n{QUESTION}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]


def salt(stored: str) -> Extras:
    """Keeps the demo's copies of one prompt apart, one for each stored quality: a put replaces none of the others."""
    return Extras(salt=f"demo {stored}")
