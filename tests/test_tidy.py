"""House rules that a linter does not know. Each message says what to do instead."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = (
    "kvstore", "codec/kvstore_codec", "client/kvstore_client", "cluster/kvstore_cluster", "protos/kvstore_proto",
)  # fmt: skip
MODULE_LINES_MAX = 420
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$|/_native\.pyi$")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "stuff"}
BANNED = {
    r"\b(TODO|FIXME|XXX)\b": "open an issue, or do it",
    r"except Exception\b": "name the error, count it in a metric and log it once",
    r"except:\s*$": "name the error",
    r"\bassert False\b": "raise AssertionError with a message",
    r"time\.sleep\(": "wait for a condition, with a deadline (tests: polling.wait_until)",
}


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = (REPOSITORY / line for line in listed.stdout.splitlines())
    return [path for path in paths if path.suffix in suffixes and path.exists() and not GENERATED.search(str(path))]


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


PYTHON = [path for path in tracked(".py") if path != Path(__file__)]


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_python_modules_are_tidy(path: Path) -> None:
    text = path.read_text()
    for pattern, instead in BANNED.items():
        found = re.search(pattern, text, re.MULTILINE)
        assert found is None, f"{name_of(path)}: {found.group()!r}: {instead}"
    assert path.stem not in VAGUE_NAMES, f"{name_of(path)}: name a module for what it holds"
    lines = text.count("\n")
    if name_of(path).startswith(PACKAGES):
        assert lines <= MODULE_LINES_MAX, f"{name_of(path)}: {lines} lines: split it by idea"
        assert not text or text.startswith('"""'), f"{name_of(path)}: say what it is for"


def test_every_package_is_typed_and_explained() -> None:
    for package in PACKAGES:
        folder = REPOSITORY / package
        assert (folder / "py.typed").exists() or package == "kvstore", f"{package}: add py.typed"
    for name in ("codec", "client", "cluster", "kvstore", "protos", "tests", "bench", "docs"):
        assert (REPOSITORY / name / "README.md").exists(), f"{name}/: a newcomer needs a short README.md"


def test_design_records_are_numbered_without_gaps() -> None:
    names = sorted(path.name for path in (REPOSITORY / "docs" / "design").glob("*.md"))
    numbers = [int(name[:4]) for name in names if name[:4].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1)), names


LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("path", tracked(".md"), ids=name_of)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), f"{name_of(path)}: dead link to {target}"
