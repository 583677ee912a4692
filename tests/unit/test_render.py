"""Figures as people read them."""

from __future__ import annotations

import pytest

from kvstore.cli.render import size


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1024, "1 KiB"), (1023 << 10, "0.999 MiB"),
        (5 << 29, "2.5 GiB"),
        (1 << 49, "512 TiB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits(value: float, shown: str) -> None:
    assert size(value) == shown
