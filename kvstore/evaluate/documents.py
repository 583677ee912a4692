"""Texts cut into documents: a prefix that is stored, and what truly follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.evaluate.engine import Engine
from kvstore.evaluate.errors import CannotEvaluate

#: Teacher-forced positions that are scored; the first of the following tokens is only read.
SCORED_TOKENS = 255
#: Titles, licences and tables of contents that a text begins with are not what it is like.
FRONT_CHARACTERS = 3000
#: Read at first for a token that is wanted; source code has fewer characters a token than this, prose too.
CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Document:
    """`prefix`: the ids that are cached; `following`: the SCORED_TOKENS + 1 ids after them."""

    name: str
    prefix: tuple[int, ...]
    following: tuple[int, ...]


def text_files(paths: Sequence[Path]) -> list[Path]:
    """Every file named, and every .txt of every folder named. Raises CannotEvaluate."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.txt"))
            if not found:
                raise CannotEvaluate(f"{path}: no .txt file in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise CannotEvaluate(f"{path}: no such text: name a file, or a folder of .txt files")
    return files


def documents(engine: Engine, paths: Sequence[Path], *, count: int, prefix_tokens: int) -> list[Document]:
    """`count` documents that do not overlap, taken from the files in turn. Raises CannotEvaluate."""
    tokens = prefix_tokens + SCORED_TOKENS + 1
    if tokens > engine.context_tokens:
        raise CannotEvaluate(
            f"{engine.name} reads at most {engine.context_tokens} tokens and a document has {tokens}: "
            "pass a smaller --prefix-tokens"
        )
    files = text_files(paths)
    each = -(-count // len(files))
    cut = [_cut(engine, file, tokens, each) for file in files]
    taken = [(file, index) for index in range(each) for file, found in enumerate(cut) if index < len(found)][:count]
    if len(taken) < count:
        raise CannotEvaluate(
            f"the texts give {len(taken)} of {count} documents of {tokens} tokens: pass longer texts with --text, "
            "fewer --documents or a smaller --prefix-tokens"
        )
    return [
        Document(
            files[file].stem + (f" {index + 1}" if index else ""),
            tuple(cut[file][index][:prefix_tokens]),
            tuple(cut[file][index][prefix_tokens:]),
        )
        for file, index in taken
    ]


def _cut(engine: Engine, file: Path, tokens: int, count: int) -> list[list[int]]:
    """At most `count` runs of `tokens` ids, from behind the front matter of a text that is long enough for it."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CannotEvaluate(f"{file}: not a text in UTF-8: {error}") from None
    beginning = engine.tokens("", beginning=True)
    body = tokens - len(beginning)
    line_end = text.find("\n", FRONT_CHARACTERS)
    for start in (line_end + 1, 0):
        for characters in (CHARACTERS_PER_TOKEN * tokens * count, len(text)):
            ids = engine.tokens(text[start : start + characters])
            runs = [beginning + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)][:count]
            if len(runs) == count:
                return runs
    return runs
