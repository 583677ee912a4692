"""Calibration texts as windows of tokens that do not overlap, so that some can be held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.calibrate.options import CalibrationFailed

#: of each file, at most so much is read: some megabytes of text are many times what a calibration needs
TEXT_BYTES_MAX = 8 << 20
_SUFFIXES = (".txt", ".md", ".rst", ".py")


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of files, and of the .txt, .md, .rst and .py files in folders, sorted by name, one level deep.

    Raises CalibrationFailed for what cannot be read."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
            if not found:
                raise CalibrationFailed(f"{path}: no {', '.join(_SUFFIXES)} file in this folder: pass one with texts")
            files += found
        else:
            files.append(path)
    return [_read(file) for file in files]


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(TEXT_BYTES_MAX).decode("utf-8", errors="replace")
    except OSError as error:
        raise CalibrationFailed(f"{file}: cannot be read: {error.strerror}") from None


def digest_of(texts: Sequence[str]) -> str:
    """ "blake2b:" and 64 hex digits of the texts in their order."""
    digest = hashlib.blake2b(digest_size=32, person=b"kvstore.texts")
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"blake2b:{digest.hexdigest()}"


def windows(tokenizer: Any, texts: Sequence[str], *, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` windows of `length` tokens, by turns from every text, each text's in random order.

    A window begins with what the tokenizer puts before any text (Llama's and Gemma's <bos>). Raises CalibrationFailed
    where the texts hold fewer."""
    prefix = [int(token) for token in tokenizer("").input_ids]
    body = length - len(prefix)
    rng = np.random.default_rng(seed)
    shuffled: list[list[list[int]]] = []
    for text in texts:
        tokens = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        order = rng.permutation(len(tokens) // body)
        shuffled.append([prefix + tokens[at * body : (at + 1) * body] for at in order])
    held = sum(map(len, shuffled))
    if held < count:
        raise CalibrationFailed(
            f"the texts hold {held} windows of {length} tokens, {count} are needed: "
            "give more text, or lower --tokens and --passes"
        )
    turns = max(map(len, shuffled))
    by_turns = [own[turn] for turn in range(turns) for own in shuffled if turn < len(own)]
    return by_turns[:count]
