"""What the documents show works as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from node_process import NodeProcess, clean_environment

from kvstore.config import NodeConfig, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
ADDRESS = "127.0.0.1:7070"


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("README.md", ["96", "(4, 2, 96, 2, 64)", "(4, 2, 96, 2, 64)"]),
        (
            "docs/api.md",
            [
                "first turn: 96 tokens, 6 chunks stored",
                "second turn: 2 chunks stored",
                "exact: True",
                "put in the background: 96 tokens",
                "at first: 96 tokens, error 0.14",
                "in the end: error 0.02",
                "read with the profile of the store: 1024 tokens",
                "layer 3: 96 tokens, exact: True",
                "complete: True",
            ],
        ),
    ],
)
def test_the_examples_run_against_a_real_node(tmp_path: Path, document: str, expected: list[str]) -> None:
    examples = [block for block in code_blocks(REPOSITORY / document, "python") if ADDRESS in block]
    assert examples
    node = NodeProcess(tmp_path)
    try:
        printed = ""
        for example in examples:
            assert example.count("\n") <= 40, "an example is short"
            done = subprocess.run(
                [sys.executable, "-c", example.replace(ADDRESS, node.address)],
                capture_output=True, text=True, timeout=60, check=False, env=clean_environment(),
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            printed += done.stdout
        for text in expected:
            assert text in printed
    finally:
        node.kill()


def test_every_key_is_documented_with_its_default(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    rows = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", text, re.MULTILINE)}
    assert rows.keys() == NodeConfig.model_fields.keys()
    for name, shown in rows.items():
        default = NodeConfig.model_fields[name].default
        if shown.startswith("`"):
            assert load_config(None, {name: shown.strip("`")}, {}).model_dump()[name] == default, name
        else:
            assert shown == str(default).removesuffix(".0") or default is None, name


def test_the_example_file_is_a_configuration(tmp_path: Path) -> None:
    (block,) = code_blocks(REPOSITORY / "docs" / "configuration.md", "toml")
    path = tmp_path / "node.toml"
    path.write_text(block)
    assert load_config(path, {}, {}).disk_capacity == 1 << 40


def test_the_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for path in [REPOSITORY / "README.md", *REPOSITORY.glob("*/README.md"), *REPOSITORY.glob("docs/*.md")]:
        named |= set(re.findall(r"(?:^|`)(?:\w+=\S+ )?make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert named
    assert named <= targets
