"""Stored bytes stay what they were: golden objects both ways, identities, tables (tests/vectors/PROVENANCE.md)."""

from __future__ import annotations

import json
from hashlib import blake2b
from importlib import resources
from typing import Any

import golden
import pytest
from coders import EVERY

import kvstore_codec as codec

every_coder = pytest.mark.parametrize("coder", EVERY.values(), ids=EVERY)
every_case = pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)


def test_no_case_is_missing_and_none_is_left_over() -> None:
    assert {path.name for path in golden.OBJECTS.iterdir()} == {case.name for case in golden.CASES}


@every_case
@every_coder
def test_encoding_gives_the_stored_bytes(case: golden.Case, coder: Any) -> None:
    stored = (golden.OBJECTS / case.name / "encoded.kvc").read_bytes()
    assert codec.encode(golden.read_input(case), case.layout, coder=coder, **case.arguments()) == stored


@every_case
@every_coder
def test_stored_bytes_decode_to_what_they_did(case: golden.Case, coder: Any) -> None:
    stored = (golden.OBJECTS / case.name / "encoded.kvc").read_bytes()
    config = json.loads((golden.OBJECTS / case.name / "config.json").read_text())
    decoded = {
        quality: golden.digest_of(
            codec.decode(stored, case.layout, quality=quality, coder=coder, profile=case.read_profile())
        )
        for quality in golden.qualities(stored)
    }
    assert decoded == config["decoded_blake2b_256"]
    if codec.inspect(stored).quality.exact:
        assert set(decoded.values()) == {golden.digest_of(golden.read_input(case))}


def test_identities() -> None:
    assert golden.identity() == json.loads((golden.VECTORS / "identity.json").read_text())


def test_tables() -> None:
    tables = resources.files("kvstore_codec").joinpath("tables.bin").read_bytes()
    expected = json.loads((golden.VECTORS / "tables.json").read_text())["tables.bin"]
    assert blake2b(tables, digest_size=32).hexdigest() == expected
