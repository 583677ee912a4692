"""The error tree: complete, one line each, and a meaning for every gRPC status."""

from __future__ import annotations

import inspect

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore_client
import kvstore_codec as codec
from kvstore_client import errors
from kvstore_client.errors import ERROR_OF_STATUS, KvClientError, from_codec, from_status, one_line

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, KvClientError)]
FAILURES = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]


def test_every_failed_status_has_a_meaning() -> None:
    assert set(ERROR_OF_STATUS) == set(FAILURES)


@pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name)
def test_a_status_becomes_one_line_that_names_the_node(status: grpc.StatusCode) -> None:
    error = from_status(status, "first\nsecond\r\n\tthird " + "x" * 10_000, "10.0.0.7:7070")
    assert type(error) is ERROR_OF_STATUS[status]
    assert "10.0.0.7:7070" in str(error)
    assert "first second third" in str(error)
    assert len(str(error)) < 400
    assert len(str(error).splitlines()) == 1


def test_a_stream_that_ends_well_but_early_is_a_protocol_violation() -> None:
    assert type(from_status(grpc.StatusCode.OK, None, "n")) is errors.ProtocolViolation


def test_details_of_a_peer_cannot_forge_a_log_line() -> None:
    error = from_status(grpc.StatusCode.INTERNAL, "ok\x1b[31m\x00\x85\u2028root logged in", "n")
    assert str(error).isprintable()


@given(st.text(max_size=500))
def test_one_line_is_short_printable_and_keeps_words(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= 200
    assert line == one_line(line) == " ".join(line.split())
    assert one_line("no  room\tleft\r\n") == "no room left"


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (codec.DamagedObject("d", code=codec.ErrorCode.TRUNCATED), errors.ObjectDamaged),
        (codec.ForeignObject("f"), errors.ObjectForeign),
        (codec.UnsupportedObject("u", code=codec.ErrorCode.VERSION_UNSUPPORTED), errors.ObjectUnsupported),
        (codec.ProfileMissing("p"), errors.ProfileMissing),
    ],
)
def test_every_object_error_of_the_codec_has_its_own(
    problem: codec.ObjectError, kind: type[errors.BadObject]
) -> None:  # fmt: skip
    assert type(from_codec(problem, "n")) is kind


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_and_is_exported(kind: type[KvClientError]) -> None:
    assert kind is getattr(kvstore_client, kind.__name__)
    assert kind.__name__ in kvstore_client.__all__
    if kind is not KvClientError:
        assert kind("what", node="n").code in errors.ErrorCode
        assert str(kind("what", node="n")) == "what (node=n)"


def test_codes_tell_the_errors_apart() -> None:
    leaves = [kind for kind in TREE if kind not in (KvClientError, errors.BadObject)]
    assert len({kind.code for kind in leaves}) == len(leaves) == len(errors.ErrorCode)


def test_a_callers_mistake_is_a_value_error() -> None:
    assert issubclass(errors.InvalidArgument, ValueError)
    assert issubclass(codec.LayoutError, ValueError)
