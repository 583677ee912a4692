"""From two looks at a node to what it did in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.cli.rates import Rates, Sample
from kvstore.cli.scrape import Scrape, latencies
from kvstore_proto.v1 import store_pb2 as pb


def sample(uptime_s: float, **counters: int) -> Sample:
    named = {name.replace("__", "."): count for name, count in counters.items()}
    return Sample(0.001, pb.StatResponse(uptime_seconds=uptime_s, counters=named))


def test_rates_are_by_the_nodes_own_time() -> None:
    before = sample(10, lookup_chunks__hit=100, lookup_chunks__miss=50, evictions__host__capacity=1)
    after = sample(
        14, lookup_chunks__hit=130, lookup_chunks__miss=60, lookup_chunks__shared=2, evictions__host__capacity=5,
        evictions__host__admin=4, evictions__hosts__capacity=100,
    )  # fmt: skip
    rates = Rates(before, after)
    assert rates.seconds == 4
    assert rates.asked == 10
    assert rates.hit_ratio == 32 / 40
    assert rates.rate("evictions", "host") == 2
    assert rates.rate("evictions") == 27
    assert rates.by_last_label("lookup_chunks") == {"hit": 7.5, "miss": 2.5, "shared": 0.5}


def test_by_the_last_of_several_labels_the_others_are_summed_up() -> None:
    rates = Rates(sample(0), sample(2, reads_by_quality__host__low=6, reads_by_quality__disk__low=2))
    assert rates.by_last_label("reads_by_quality") == {"low": 4.0}


def test_a_restart_counts_from_zero() -> None:
    rates = Rates(sample(1000, puts__stored=500), sample(2, puts__stored=8))
    assert (rates.seconds, rates.rate("puts", "stored")) == (2, 4)


def test_the_same_moment_divides_by_nothing() -> None:
    rates = Rates(sample(5, puts__stored=1), sample(5, puts__stored=1))
    assert (rates.rate("puts"), rates.hit_ratio) == (0, None)


def scrape(**buckets: int) -> Scrape:
    bounds = {"low": 0.001, "mid": 0.01, "high": 0.1, "inf": float("inf")}
    return Scrape({"read": {bounds[name]: float(count) for name, count in buckets.items()}}, {}, {})


def test_quantiles_are_those_of_prometheus() -> None:
    found = latencies(scrape(low=5, mid=5, high=5, inf=5), scrape(low=5, mid=95, high=105, inf=105))["read"]
    assert found.count == 100
    assert found.p50_s == pytest.approx(0.001 + 0.009 * 50 / 90)
    assert found.p99_s == pytest.approx(0.01 + 0.09 * 9 / 10)


def test_beyond_the_last_bound_is_the_last_bound() -> None:
    assert latencies(None, scrape(low=0, mid=0, high=1, inf=100))["read"].p99_s == 0.1


def test_nothing_ended_is_no_latency() -> None:
    assert latencies(scrape(low=7, inf=7), scrape(low=7, inf=7)) == {}


@given(st.lists(st.sampled_from([0.0005, 0.005, 0.05, 0.5]), min_size=1, max_size=200))
def test_quantiles_are_in_the_bucket_of_the_observation(seconds: list[float]) -> None:
    counts = {name: sum(s <= bound for s in seconds) for name, bound in (("low", 0.001), ("mid", 0.01), ("high", 0.1))}
    found = latencies(None, scrape(**counts, inf=len(seconds)))["read"]
    ordered = sorted(seconds)
    for q, value in ((0.5, found.p50_s), (0.99, found.p99_s)):
        exact = ordered[max(0, -(-int(q * 100) * len(seconds) // 100) - 1)]
        low, high = {0.0005: (0, 0.001), 0.005: (0.001, 0.01), 0.05: (0.01, 0.1), 0.5: (0.1, 0.1)}[exact]
        assert low - 1e-12 <= value <= high + 1e-12
