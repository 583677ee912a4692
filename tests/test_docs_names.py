"""What the documents name is there: what links lead to, commands and their options, metrics, settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prometheus_client import CollectorRegistry
from typer.core import TyperGroup

from kvstore.cli.app import app
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.metrics import COUNTERS, SECONDS
from kvstore_client.metrics import client_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path for folder in (".", "*", "docs/design", "tests/*") for path in sorted(REPOSITORY.glob(f"{folder}/*.md"))
]  # fmt: skip
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def headings(document: Path) -> set[str]:
    """As the part of a link behind its #."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", document.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not heading or target.suffix != ".md" or heading in headings(target), link


def lines_of_code(document: Path) -> Iterator[str]:
    text = document.read_text()
    for block in BLOCK.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def commands(document: Path) -> Iterator[tuple[Any, list[str], str]]:
    """(command, words behind it, line) of each `kvstore …` that it shows."""
    root = typer.main.get_command(app)
    for line in lines_of_code(document):
        for shown in re.findall(r"(?:^|[\s/])kvstore ([a-z][^#|;&]*)", line):
            command: Any = root
            words = shown.split()
            while isinstance(command, TyperGroup) and words and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            yield command, words, line


@each_document
def test_commands_and_their_options_exist(document: Path) -> None:
    for command, words, line in commands(document):
        named = [word for word in words if re.match(r"[a-z]", word)]
        assert not isinstance(command, TyperGroup) or not named, line
        options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= {*options, "--help"}, line


def test_commands_are_found() -> None:
    shown = [words for command, words, _ in commands(REPOSITORY / "README.md") if command.name == "serve"]
    assert ["--disk-path", "/var/lib/kvstore", "--host-capacity", "8GiB", "--disk-capacity", "100GiB"] in shown


@each_document
def test_programs_and_their_options_exist(document: Path) -> None:
    for line in lines_of_code(document):
        for name, behind in re.findall(r"python -m (bench[.\w]*)([^#|;&]*)", line):
            source = (REPOSITORY / f"{name.replace('.', '/')}.py").read_text()
            for option in re.findall(r"(?<!\S)--[a-z-]+", behind):
                assert f'"{option}"' in source, line


def test_a_clients_metrics_are_documented() -> None:
    registry = CollectorRegistry()
    client_metrics(registry)
    there = {f"{each.name}_total" if each.type == "counter" else each.name for each in registry.collect()}
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"`(kvstore_client_\w+)", text)) == there


def test_the_connectors_metrics_and_keys_are_documented() -> None:
    text = (REPOSITORY / "docs" / "vllm.md").read_text()
    assert set(re.findall(r"^\| `vllm:kvstore_(\w+)`", text, re.MULTILINE)) == {f"{n}_total" for n in COUNTERS} | {
        *SECONDS
    }
    _, table = text.split("What `kv_connector_extra_config` takes")
    rows = re.findall(r"^\| `(\w+)` \|", table.split("\n## ")[0], re.MULTILINE)
    assert rows == [each.name for each in fields(ConnectorConfig)]
