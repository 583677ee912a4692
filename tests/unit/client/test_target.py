"""Targets as users write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client import InvalidArgument
from kvstore_client.target import parse_target

PATH_BYTES_MAX = 107  # sun_path, less its final zero


@pytest.mark.parametrize(
    ("target", "seeds"),
    [
        ("127.0.0.1:7070", ("127.0.0.1:7070",)),
        ("cache-0.cache.svc:7070", ("cache-0.cache.svc:7070",)),
        ("[::1]:7070", ("[::1]:7070",)),
        ("unix:///run/kvstore.sock", ("unix:/run/kvstore.sock",)),
        ("unix:/run/kvstore.sock", ("unix:/run/kvstore.sock",)),
        ("a:1, b:2 ,a:1", ("a:1", "b:2")),
        (["b:2", "unix:///s"], ("b:2", "unix:/s")),
        (("a:1",), ("a:1",)),
        ("unix:/" + "x" * (PATH_BYTES_MAX - 1), ("unix:/" + "x" * (PATH_BYTES_MAX - 1),)),
    ],
)
def test_good_targets(target: str | list[str], seeds: tuple[str, ...]) -> None:
    assert parse_target(target) == seeds


@pytest.mark.parametrize(
    "target",
    [
        "", "a", "a:", ":1", "a:0", "a:65536", "a:1,", "a:1,,b:2", "http://a:1", "a:1/x", "::1:7070", "a b:1", "a:１",
        b"a:1", None, 7070, "unix:/a\x00b", "unix:/a\nb", "unix:/\ud800", "\ud800:1",
        "unix:run.sock", "unix:", "unix:/" + "x" * PATH_BYTES_MAX, "dns:///a:1", [], [None], [b"a:1"], "a:1\n--x",
    ],
)  # fmt: skip
def test_bad_targets_say_what_to_use(target: Any) -> None:
    with pytest.raises(InvalidArgument) as raised:
        parse_target(target)
    assert str(raised.value).isprintable()
    assert "use " in str(raised.value) or "socket's path" in str(raised.value)


@given(st.text(max_size=60) | st.from_regex(r"\A(unix:.{0,9}|\[?[a-z:]{1,5}\]?:\d{1,6})(,.{0,9})?\Z"))
def test_any_text_is_a_target_or_an_invalid_argument(text: str) -> None:
    try:
        seeds = parse_target(text)
    except InvalidArgument:
        return
    assert seeds == parse_target(list(seeds)), "what is parsed parses to itself"
