"""The client while its node is stopped, killed, restarted or damaged; and calls that are cancelled half-way."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from disk_places import Place, place_of
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore.index.entry import ObjectKey
from kvstore_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Namespace,
    PutResult,
    Unavailable,
)
from kvstore_client.transports.bulk_path import Transport

StartNode = Callable[..., NodeProcess]
R = TypeVar("R")
LAYOUT = codec.KVLayout.uniform(
    model="faults", revision="r", num_layers=24, kv_heads=4, head_dim=128, dtype="float16", chunk_tokens=128,
    rope=codec.RoPE(theta=10000.0),
)  # fmt: skip
CHUNK, CHUNKS = LAYOUT.chunk_tokens, 8  # 6 MiB each, slow enough to decode that a fault finds the call under way
TOKENS = list(range(CHUNKS * CHUNK))
DEADLINE_S, SLACK_S = 1.0, 0.5
RECOVERS_S_MAX = 3.0
SOME = 4  # chunks, where that is enough
PATIENT_S = 30.0  # of calls that are not about time
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kv() -> Any:
    whole = codec.empty(LAYOUT, len(TOKENS))
    whole[...] = np.random.default_rng(5).standard_normal(whole.shape, np.float32).astype(np.float16)
    return whole


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    return ("--host-capacity", "512MiB", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "1GiB")


def a_client(
    node: NodeProcess, registry: CollectorRegistry, *, strict: bool = False, transport: Transport = "auto"
) -> Client:
    return Client(node.address, strict=strict, deadline=DEADLINE_S, registry=registry, transport=transport)


def timed(call: Callable[[], R]) -> R:
    began = time.monotonic()
    try:
        return call()
    finally:
        took_s = time.monotonic() - began
        assert took_s < DEADLINE_S + SLACK_S, f"took {took_s:.2f} s"


@contextmanager
def stopped(node: NodeProcess) -> Iterator[None]:
    node.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.process.send_signal(signal.SIGCONT)


def moved(registry: CollectorRegistry, direction: str) -> float:
    return registry.get_sample_value("kvstore_client_stream_bytes_total", {"direction": direction}) or 0.0


@contextmanager
def under_way(call: Callable[[], R], registry: CollectorRegistry, direction: str) -> Iterator[Future[R]]:
    """The call in a thread, once some of its bytes have moved."""
    before = moved(registry, direction)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(call)
        wait_until(lambda: moved(registry, direction) > before or future.done(), "bytes move")
        assert not future.done(), "the call was too fast for the fault"
        yield future


def intact(got: tuple[Any, int], kv: Any) -> int:
    """Tokens of a get, whose values must be exact."""
    array, tokens = got
    assert tokens % CHUNK == 0
    assert bits(array) == bits(kv[:, :, :tokens])
    return tokens


def works_again(cache: Namespace, kv: Any) -> None:
    """A small get and put do, soon and without a new client."""
    small = TOKENS[:CHUNK]

    def works() -> bool:
        try:
            stored = cache.put(small, kv[:, :, :CHUNK], quality="lossless", deadline=RECOVERS_S_MAX)
            return stored.tokens == CHUNK == intact(cache.get(small, deadline=RECOVERS_S_MAX), kv)
        except Unavailable:  # strict, and not yet connected again
            return False

    began = time.monotonic()
    wait_until(works, "the client works again", deadline_s=RECOVERS_S_MAX)
    assert time.monotonic() - began < RECOVERS_S_MAX + SLACK_S


# A node that does not answer


@pytest.mark.parametrize("connected", [False, True])
def test_a_stopped_node_is_a_miss_in_time(
    start_node: StartNode, flags: tuple[str, ...], registry: CollectorRegistry, kv: Any, connected: bool
) -> None:
    node = start_node(*flags)
    small, small_kv = TOKENS[:CHUNK], kv[:, :, :CHUNK]
    with a_client(node, registry) as lenient, a_client(node, CollectorRegistry(), strict=True) as strict:
        cache, strict_cache = lenient.namespace(LAYOUT), strict.namespace(LAYOUT)
        if connected:
            assert cache.put(small, small_kv, quality="lossless", deadline=PATIENT_S).stored == 1
            assert strict_cache.lookup(small).tokens == CHUNK
        with stopped(node), ThreadPoolExecutor(7) as threads:
            misses: list[Future[int]] = [
                threads.submit(timed, lambda: cache.lookup(small).tokens),
                threads.submit(timed, lambda: cache.get(small)[1]),
                threads.submit(timed, lambda: cache.put(small, small_kv, quality="raw").tokens),
                threads.submit(timed, lambda: cache.delete(small).objects),
            ]
            errors: list[Future[Any]] = [
                threads.submit(timed, lambda: strict_cache.lookup(small)),
                threads.submit(timed, lambda: strict_cache.get(small)),
                threads.submit(timed, lambda: strict_cache.delete(small)),
            ]
            assert [miss.result() for miss in misses] == [0] * 4
            kinds = {type(error.exception()) for error in errors}
            assert kinds == {DeadlineExceeded} if connected else kinds <= {DeadlineExceeded, Unavailable}
        works_again(cache, kv)
        works_again(strict_cache, kv)


@pytest.mark.parametrize("strict", [False, True])
def test_a_node_that_stops_during_a_get(
    start_node: StartNode, flags: tuple[str, ...], registry: CollectorRegistry, kv: Any, strict: bool
) -> None:
    node = start_node(*flags)
    with a_client(node, registry, strict=strict, transport="tcp") as client:
        cache = client.namespace(LAYOUT)
        assert cache.put(TOKENS, kv, quality="lossless", deadline=PATIENT_S).stored == CHUNKS
        with under_way(lambda: timed(lambda: cache.get(TOKENS)), registry, "in") as call, stopped(node):
            if strict:
                assert type(call.exception(10)) is DeadlineExceeded
            else:
                assert intact(call.result(10), kv) < len(TOKENS)
        works_again(cache, kv)
        assert intact(cache.get(TOKENS, deadline=PATIENT_S), kv) == len(TOKENS)


def test_a_node_that_stops_once_it_has_said_where_objects_are_is_not_needed(
    start_node: StartNode, flags: tuple[str, ...], registry: CollectorRegistry, kv: Any
) -> None:
    """They are read from its memory, which it cannot let go of while it is stopped."""
    node = start_node(*flags)
    with a_client(node, registry, strict=True, transport="shm") as client:
        cache = client.namespace(LAYOUT)
        assert cache.put(TOKENS, kv, quality="lossless", deadline=PATIENT_S).stored == CHUNKS
        with under_way(lambda: cache.get(TOKENS, deadline=PATIENT_S), registry, "in") as call, stopped(node):
            assert intact(call.result(PATIENT_S), kv) == len(TOKENS)
        works_again(cache, kv)


@pytest.mark.parametrize("strict", [False, True])
def test_a_node_that_stops_during_a_put(
    start_node: StartNode, flags: tuple[str, ...], registry: CollectorRegistry, kv: Any, strict: bool
) -> None:
    node = start_node(*flags)
    with a_client(node, registry, strict=strict) as client:
        cache = client.namespace(LAYOUT)
        with (
            under_way(lambda: timed(lambda: cache.put(TOKENS, kv, quality="raw")), registry, "out") as call,
            stopped(node),
        ):
            outcome = call.exception(10) or call.result()
        if strict:
            assert type(outcome) is DeadlineExceeded
        else:
            assert isinstance(outcome, PutResult)
            assert outcome.rejected == CHUNKS
            assert registry.get_sample_value("kvstore_client_rejected_chunks_total", {"reason": "deadline"}) == CHUNKS
        works_again(cache, kv)
        assert cache.put(TOKENS, kv, quality="raw", deadline=PATIENT_S).tokens == len(TOKENS)
        wait_until(lambda: client.stat().staged_bytes == 0, "the put that was cut off leaves nothing staged")


# A node that dies


@pytest.mark.parametrize("strict", [False, True])
def test_kill_9_during_a_get_and_a_restart(
    start_node: StartNode, flags: tuple[str, ...], registry: CollectorRegistry, kv: Any, strict: bool
) -> None:
    node = start_node(*flags)
    with Client(node.address, strict=strict, deadline=PATIENT_S, registry=registry) as client:
        cache = client.namespace(LAYOUT)
        assert cache.put(TOKENS, kv, quality="lossless", durable=True).durable
        with under_way(lambda: cache.get(TOKENS), registry, "in") as call:
            node.kill()
            killed = time.monotonic()
            outcome = call.exception(10) or call.result()
        assert time.monotonic() - killed < DEADLINE_S + SLACK_S, "a connection that is gone is not waited for"
        if strict:
            assert type(outcome) is Unavailable
        else:
            assert intact(outcome, kv) < len(TOKENS)  # type: ignore[arg-type]
            assert registry.get_sample_value("kvstore_client_misses_total", {"reason": "unavailable"}) == 1
            assert cache.get(TOKENS)[1] == 0, "the node is gone"
        start_node(*flags, listen=node.address)
        wait_until(
            lambda: served(cache, kv), "what was put durably is served again", deadline_s=RECOVERS_S_MAX
        )  # fmt: skip


def served(cache: Namespace, kv: Any) -> bool:
    try:
        return intact(cache.get(TOKENS), kv) == len(TOKENS)
    except Unavailable:  # strict, and not yet connected again
        return False


def test_kill_9_during_a_put_and_a_restart(
    start_node: StartNode, flags: tuple[str, ...], registry: CollectorRegistry, kv: Any
) -> None:
    node = start_node(*flags)
    with Client(node.address, deadline=PATIENT_S, registry=registry) as client:
        cache = client.namespace(LAYOUT)
        with under_way(lambda: cache.put(TOKENS, kv, quality="raw"), registry, "out") as call:
            node.kill()
            result = call.result(10)
        assert (result.rejected, result.tokens) == (CHUNKS, 0)
        (reason,) = result.reasons
        assert "cannot be reached" in reason
        start_node(*flags, listen=node.address)
        works_again(cache, kv)
        assert cache.put(TOKENS, kv, quality="raw").tokens == len(TOKENS)


def test_get_after_get_while_the_node_dies_and_comes_back(
    start_node: StartNode, flags: tuple[str, ...], kv: Any
) -> None:  # fmt: skip
    """Whenever it dies: exact values, whole chunks, no exception."""
    small = TOKENS[: 3 * CHUNK]
    node = start_node(*flags)
    done = threading.Event()
    lengths: list[int] = []
    with Client(node.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        assert cache.put(small, kv[:, :, : 3 * CHUNK], quality="lossless", durable=True, deadline=PATIENT_S).durable

        def read() -> None:
            while not done.is_set():
                lengths.append(intact(cache.get(small), kv))

        with ThreadPoolExecutor(2) as threads:
            readers = [threads.submit(read) for _ in range(2)]
            try:
                for _ in range(1):
                    so_far = len(lengths)
                    wait_until(lambda so_far=so_far: 3 * CHUNK in lengths[so_far:], "hits")  # type: ignore[misc]
                    node.kill()
                    wait_until(lambda: lengths[-1] == 0, "misses")
                    node = start_node(*flags, listen=node.address)
                so_far = len(lengths)
                wait_until(lambda: 3 * CHUNK in lengths[so_far:], "hits again", deadline_s=RECOVERS_S_MAX)
            finally:
                done.set()
            for reader in readers:
                reader.result(10)


# A disk that forgets


def flipped(place: Place) -> None:
    place.flip(place.length // 2, 0)


def cut(place: Place) -> None:
    place.write(place.length - 100, bytes(100))


def removed(place: Place) -> None:
    place.punch()


@pytest.mark.parametrize("damage", [flipped, cut, removed], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("running", [False, True])
def test_a_damaged_object_ends_the_prefix(
    start_node: StartNode, tmp_path: Path, damage: Callable[[Place], None], running: bool
) -> None:
    flags = ("--host-capacity", "0", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "1GiB")
    layout = small_layout("damaged", layers=8, head_dim=64)
    tokens = TOKENS[: 4 * layout.chunk_tokens]
    kv = random_kv(layout, len(tokens), 1)
    node = start_node(*flags)
    with Client(node.address, deadline=PATIENT_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        assert cache.put(tokens, kv, quality="raw", durable=True).durable
        if not running:
            node.stop()
        bad = codec.chunk_refs(layout, tokens)[2]
        damage(place_of(tmp_path / "disk", ObjectKey(layout.namespace_id, bad.hash, 0)))
        if not running:
            start_node(*flags, listen=node.address)
        got, n = cache.get(tokens)
        assert (n, bits(got)) == (bad.first_token, bits(kv[:, :, : bad.first_token]))
        assert cache.put(tokens, kv, quality="raw").tokens == len(tokens)
        got, n = cache.get(tokens)
        assert (n, bits(got)) == (len(tokens), bits(kv))


# Calls that are cancelled


async def turns_until(condition: Callable[[], bool]) -> None:
    """Lets the loop turn until `condition()` holds."""
    end = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("times", [1, 3])
async def test_nothing_is_written_after_a_get_is_cancelled(
    start_node: StartNode, flags: tuple[str, ...], kv: Any, times: int
) -> None:
    """Also where it is cancelled again while it waits for what still writes."""
    node = start_node(*flags)
    tokens, kv = TOKENS[: SOME * CHUNK], kv[:, :, : SOME * CHUNK]
    async with AsyncClient(node.address, deadline=PATIENT_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        await cache.put(tokens, kv, quality="high")
        out = np.empty_like(kv)
        for chunk in range(SOME - 1):
            out[...] = 7
            part = out[:, :, chunk * CHUNK : (chunk + 1) * CHUNK]
            call = asyncio.ensure_future(cache.get(tokens, out=out))
            await turns_until(lambda part=part: bool((part != 7).any()))  # type: ignore[misc]
            assert not call.done(), "the get was too fast for the test"
            for _ in range(times):
                call.cancel()
                await asyncio.sleep(0.001)
            with pytest.raises(asyncio.CancelledError):
                await call
            out[...] = 7
            await asyncio.sleep(0.3)
            assert (out == 7).all()
        assert (await cache.get(tokens))[1] == len(tokens)


async def test_nothing_is_written_after_a_gets_deadline(start_node: StartNode, flags: tuple[str, ...], kv: Any) -> None:
    node = start_node(*flags)
    tokens, kv = TOKENS[: SOME * CHUNK], kv[:, :, : SOME * CHUNK]
    async with AsyncClient(node.address, deadline=PATIENT_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        assert (await cache.put(tokens, kv, quality="high")).stored == SOME
        whole, n = await cache.get(tokens)
        assert n == len(tokens)
        out = np.empty_like(kv)
        lengths = set()
        for deadline in (0.002, 0.005, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
            got, n = await cache.get(tokens, out=out, deadline=deadline)
            assert bits(got) == bits(whole[:, :, :n])
            lengths.add(n)
            out[...] = 7
            await asyncio.sleep(0.1)
            assert (out == 7).all()
        assert min(lengths) < len(tokens)


async def test_a_cancelled_put_leaves_nothing_behind(
    start_node: StartNode, flags: tuple[str, ...], registry: CollectorRegistry, kv: Any
) -> None:
    node = start_node(*flags)
    async with AsyncClient(node.address, deadline=PATIENT_S, registry=registry) as client:
        cache = client.namespace(LAYOUT)
        call = asyncio.ensure_future(cache.put(TOKENS, kv, quality="raw"))
        await turns_until(lambda: moved(registry, "out") > 0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        for _ in range(100):
            stat = await client.stat()
            if not stat.staged_bytes:
                break
            await asyncio.sleep(0.01)
        assert (stat.objects, stat.staged_objects, stat.staged_bytes) == (0, 0, 0)
        assert (await cache.put(TOKENS, kv, quality="raw")).stored == CHUNKS
