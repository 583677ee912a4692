"""`kvstore eval` end to end on a tiny model with random weights: figures that must hold for any model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from node_process import KVSTORE, clean_environment

import kvstore_codec as codec
from kvstore.cli import app as cli
from kvstore.cli.outcome import ExitCode

PREFIX_TOKENS, TAIL, DOCUMENTS = 1024, 16, 2
SENTENCE = "The {0} mill by the river ground {1} sacks of barley, and the miller said it was the {0} of {2}.\n"
WORDS = ("old", "tall", "quiet", "narrow", "white", "broken", "second", "lower", "long", "cold", "new")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, saved in bfloat16 with a tokenizer of single bytes."""
    import torch
    from tiny_models import tiny
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    net = tiny("llama", vocab_size=256, max_position_embeddings=2048, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("_proj.weight"):  # at their first 0.02 nothing that is cached would matter
                weight.mul_(8)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("one", "two"), 1):
        lines = (
            SENTENCE.format(WORDS[i * number % 11], i * 7919 % 1000, WORDS[i * 5 % 11 - number]) for i in range(90)
        )
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KVSTORE, "eval", *map(str, arguments)], capture_output=True, text=True, timeout=200, check=False,
        env=clean_environment(),
    )  # fmt: skip


def profile_of(model_id: str) -> codec.Profile:
    """A statistics profile, as a namespace would learn it, of a model of the tiny one's shape."""
    layout = codec.KVLayout.uniform(
        model=model_id, revision="1", num_layers=2, kv_heads=2, head_dim=16, chunk_tokens=16,
        rope=codec.RoPE(theta=10000.0),
    )  # fmt: skip
    kv = np.random.default_rng(2).standard_normal((2, 2, 16, 2, 16)).astype(ml_dtypes.bfloat16)
    return codec.learn_statistics([(kv, 16)], layout)


SMALL = ("--prefix-tokens", PREFIX_TOKENS, "--tail", TAIL, "--documents", DOCUMENTS)


@pytest.fixture(scope="module")
def evaluated(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report, with its tables as "stdout" and the plot's bytes as "plot"."""
    folder = tmp_path_factory.mktemp("figures")
    done = run(
        "--model", model, "--text", texts, *SMALL, "--turns", 2, "--chunk-tokens", 256, "--chunk-tokens", 16,
        "--out", folder / "report.json", "--plot", folder / "plot.png",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report | {"stdout": done.stdout, "plot": (folder / "plot.png").read_bytes()}


def named(report: dict[str, Any], codec: str, chunk_tokens: int | None = 256) -> dict[str, Any]:
    rows = [row for row in report["rows"] if row["name"]["codec"] == codec]
    (row,) = (row for row in rows if row["name"]["chunk_tokens"] == chunk_tokens)
    assert isinstance(row, dict)
    return row


@pytest.mark.slow
def test_an_exact_codec_changes_nothing_at_all(evaluated: dict[str, Any]) -> None:
    for chunk_tokens in (256, 16):
        row = named(evaluated, "lossless", chunk_tokens)
        for summary in (row["loaded"], row["whole"]):
            for one in summary["documents"]:
                assert (one["kl"], one["nll_delta"], one["top1"]) == (0, 0, 1)
        for score in row["tasks"]:
            assert score["log_likelihood_delta"] == 0
            assert score["probability"] == score["probability_reference"] > 0


@pytest.mark.slow
def test_quality_costs_bits_and_loss_falls_with_it(evaluated: dict[str, Any]) -> None:
    high, medium, low = (named(evaluated, quality) for quality in ("high", "medium", "low"))
    assert high["bits_per_element"] > medium["bits_per_element"] > low["bits_per_element"] > 0
    for summary in ("loaded", "whole"):
        assert 0 < high[summary]["kl"] < medium[summary]["kl"] < low[summary]["kl"]
    assert named(evaluated, "KIVI-4", None)["whole"]["kl"] < named(evaluated, "KIVI-2", None)["whole"]["kl"]
    assert (
        named(evaluated, "CacheGen paper 0.25", 10)["whole"]["kl"]
        < named(evaluated, "CacheGen paper 1", 10)["whole"]["kl"]
    )
    for row in evaluated["rows"]:
        assert row["ratio"] == pytest.approx(16 / row["bits_per_element"])
        assert len(row["loaded"]["documents"]) == len(row["bits_by_document"]) == DOCUMENTS


@pytest.mark.slow
def test_structure_of_the_codec(evaluated: dict[str, Any]) -> None:
    assert [one["quality"] for one in evaluated["prefix_reading"]] == ["low", "medium", "high"]
    for one in evaluated["prefix_reading"]:
        row = named(evaluated, one["quality"])
        assert one["read_bits_per_element"] == pytest.approx(row["bits_per_element"], rel=0.03)
        assert one["read_kl"] == pytest.approx(row["loaded"]["kl"])
        assert one["alone_bits_per_element"] == pytest.approx(row["bits_per_element"], rel=0.1)
        assert one["alone_kl"] == pytest.approx(row["loaded"]["kl"], rel=0.0 if one["quality"] == "low" else 1.0)
    assert [one["row"]["codec"] for one in evaluated["generation"]] == ["high", "medium", "low"]
    assert all(one["turns_kl"] > 0 for one in evaluated["generation"])
    for page in evaluated["page_sizes"]:
        assert page["small_bits_per_element"] > page["large_bits_per_element"]


@pytest.mark.slow
def test_tables_and_plot(evaluated: dict[str, Any]) -> None:
    for heading in ("bits/elt", "KL no tail", "Δppl %", "retrieval", "stored at high", "in 2 turns"):
        assert heading in evaluated["stdout"]
    assert evaluated["plot"].startswith(b"\x89PNG")
    assert len(evaluated["plot"]) > 10_000


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_one_line(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    short = tmp_path / "short.txt"
    short.write_text("Too short.\n" * 50)
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = tmp_path / "foreign.kvp"
    profile_of("another-model").save(foreign)
    good = ("--model", model, "--text", texts)
    for arguments, names in (
        (("--model", tmp_path / "none", "--text", texts), "none: no model is there"),
        (("--model", broken, "--text", texts), "broken: transformers cannot load this model"),
        (("--model", model, "--text", short, *SMALL), "the texts give 0 of 2 documents of 1280 tokens"),
        (("--model", model, "--text", empty), "empty: no .txt file"),
        (("--model", model, "--text", tmp_path / "none.txt"), "none.txt: no such text"),
        ((*good, "--prefix-tokens", 1000), "no multiple of --chunk-tokens 256"),
        ((*good, "--prefix-tokens", 2048), "reads at most 2048 tokens"),
        ((*good, "--tail", 1536), "leaves nothing"),
        ((*good, "--quality", "best"), "best"),
        ((*good, "--dtype", "int8"), "--dtype int8"),
        ((*good, "--profile", tmp_path / "none.kvp"), "none.kvp"),
        ((*good, "--profile", foreign), "foreign.kvp"),
        ((*good, "--plot", tmp_path / "plot.docx"), "plot.docx"),
        ((*good, "--out", tmp_path), "is a folder"),
        ((*good, "--out", tmp_path / "none" / "out.json"), "the folder does not exist"),
    ):
        assert cli.run(["eval", *map(str, arguments)]) == ExitCode.USAGE
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("kvstore: ")
        assert said.err.count("\n") == 1
        assert names in said.err
