"""Client, sidecar and upstream nodes as processes: what the sidecar lacks comes from upstream once, what is put goes
there behind, and what it holds outlives the engine, the upstream and, with a disk, itself."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import kv_objects as kv
import pytest
from hostile_server import Answer, Held, HostileServer, pieces
from node_process import KVSTORE, NodeProcess, clean_environment
from polling import wait_until
from prometheus_client import CollectorRegistry
from prompts import Prompt, layout, prompt, same
from small_profiles import transform_profile

from kvstore.cli.app import run
from kvstore.cli.outcome import ExitCode
from kvstore_client import Client, Namespace
from kvstore_codec import Quality
from kvstore_proto.v1 import admin_pb2
from kvstore_proto.v1 import store_pb2 as pb

LAYOUT = layout()
CHUNKS = 5
ONE = prompt(LAYOUT, CHUNKS * 16, seed=1)
SMALL = ("--host-capacity", "64MiB")
PATIENT = ("--upstream-timeout-ms", "5000")  # lest a busy machine makes misses of hits
StartNode = Callable[..., NodeProcess]


class Pair:
    """A sidecar and its upstream, and what they counted since the last look."""

    def __init__(self, folder: Path) -> None:
        self.upstream = NodeProcess(folder, *SMALL, "--node-id", "upstream")
        self.sidecar = NodeProcess(
            folder, "--upstream", self.upstream.address, *SMALL, *PATIENT, "--node-id", "sidecar",
            listen=f"unix://{folder}/shared.sock", role="sidecar",
        )  # fmt: skip
        self._seen = {self.upstream: counters(self.upstream), self.sidecar: counters(self.sidecar)}

    def counted(self, node: NodeProcess) -> Counter[str]:
        before, self._seen[node] = self._seen[node], counters(node)
        return self._seen[node] - before


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    found = Pair(tmp_path_factory.mktemp("pair"))
    yield found
    found.sidecar.kill()
    found.upstream.kill()


@pytest.fixture
def pair(started: Pair, cache_of: Callable[..., Namespace]) -> Pair:
    """Both empty. Processes take seconds to start, so tests that only read and write share them."""
    cache_of(started.sidecar.address).delete()
    for node in (started.upstream, started.sidecar):
        started.counted(node)
    return started


@pytest.fixture
def start_sidecar(start_node: StartNode, tmp_path: Path) -> Callable[..., NodeProcess]:
    def start(upstream: str, *flags: str) -> NodeProcess:
        return start_node(
            "--upstream", upstream, *SMALL, *PATIENT, *flags, listen=f"unix://{tmp_path}/sidecar.sock", role="sidecar"
        )

    return start


@pytest.fixture
def cache_of() -> Iterator[Callable[..., Namespace]]:
    """The cache of a new client of these addresses."""
    clients: list[Client] = []

    def connect(*addresses: str, **options: object) -> Namespace:
        clients.append(Client(list(addresses), deadline=20.0, registry=CollectorRegistry()))
        return clients[-1].namespace(LAYOUT, **options)  # type: ignore[arg-type]

    yield connect
    for client in clients:
        client.close()


def counters(node: NodeProcess) -> Counter[str]:
    return Counter(kv.stat(node.store).counters)


def holds(node: NodeProcess, what: Prompt) -> int:
    return len(kv.lookup(node.store, what.layout, [ref.hash for ref in what.refs]))


def tiers(cache: Namespace, what: Prompt = ONE) -> list[str]:
    return [chunk.tier for chunk in cache.lookup(what.tokens).chunks]


def assert_read(cache: Namespace, what: Prompt = ONE) -> None:
    got, tokens = cache.get(what.tokens)
    assert tokens == len(what.tokens)
    assert same(got, what.kv)


def test_a_miss_is_read_from_upstream_once(pair: Pair, cache_of: Callable[..., Namespace]) -> None:
    cache_of(pair.upstream.address).put(ONE.tokens, ONE.kv, quality="raw")
    cache = cache_of(pair.sidecar.address)
    assert tiers(cache) == ["upstream"] * CHUNKS
    assert_read(cache)
    assert pair.counted(pair.upstream)["reads.host"] == CHUNKS
    assert_read(cache_of(pair.sidecar.address))
    assert tiers(cache) == ["host"] * CHUNKS
    assert pair.counted(pair.upstream) == Counter(), "it was not asked again, not even for a lookup"
    seen = pair.counted(pair.sidecar)
    assert (seen["reads.upstream"], seen["lookup_chunks.upstream"]) == (CHUNKS, 2 * CHUNKS)


def test_the_start_here_and_the_rest_upstream_is_one_prefix(pair: Pair, cache_of: Callable[..., Namespace]) -> None:
    cache_of(pair.upstream.address).put(ONE.tokens, ONE.kv, quality="raw")
    cache = cache_of(pair.sidecar.address)
    kv.put(pair.sidecar.store, LAYOUT, [kv.StoredChunk(ref, ONE.blob(at)) for at, ref in enumerate(ONE.refs[:2])])
    assert tiers(cache) == ["host"] * 2 + ["upstream"] * (CHUNKS - 2)
    assert_read(cache)
    assert pair.counted(pair.upstream)["reads.host"] == CHUNKS - 2


@pytest.mark.parametrize("write", ["behind", "through", "off"])
def test_what_is_put_goes_upstream_as_configured(
    pair: Pair, start_sidecar: Callable[..., NodeProcess], cache_of: Callable[..., Namespace], write: str
) -> None:
    upstream = pair.upstream
    sidecar = pair.sidecar if write == "behind" else start_sidecar(upstream.address, "--upstream-write", write)
    cache = cache_of(sidecar.address)
    assert cache.put(ONE.tokens, ONE.kv, quality="high").stored == CHUNKS
    if write == "behind":
        wait_until(lambda: holds(upstream, ONE) == CHUNKS, "it arrives behind the put")
    assert holds(upstream, ONE) == (0 if write == "off" else CHUNKS)
    assert tiers(cache) == ["host"] * CHUNKS
    if write != "off":
        (listed, *_) = upstream.store.List(pb.ListRequest(), timeout=10).objects
        assert (listed.model, listed.quality) == (LAYOUT.model, Quality.HIGH), "with its layout"


def test_what_upstream_holds_is_not_sent(pair: Pair, cache_of: Callable[..., Namespace]) -> None:
    cache_of(pair.upstream.address).put(ONE.tokens, ONE.kv, quality="raw")
    assert pair.counted(pair.upstream)["stored_bytes"] > 0
    had = counters(pair.sidecar)["upstream_writes.have"]
    chunks = [kv.StoredChunk(ref, ONE.blob(at)) for at, ref in enumerate(ONE.refs)]
    kv.put(pair.sidecar.store, LAYOUT, chunks)  # as by a client that did not look it up
    wait_until(lambda: counters(pair.sidecar)["upstream_writes.have"] - had == CHUNKS, "all were offered")
    assert pair.counted(pair.upstream)["stored_bytes"] == 0


def test_a_delete_reaches_upstream(pair: Pair, cache_of: Callable[..., Namespace]) -> None:
    """Also what is still on its way there."""
    upstream = pair.upstream
    cache, other = cache_of(pair.sidecar.address), prompt(LAYOUT, 32, seed=2)
    for each in (other, ONE):
        cache.put(each.tokens, each.kv, quality="raw")
    wait_until(lambda: holds(upstream, other) == 2, "it is there, too")
    assert cache.delete(ONE.tokens).objects == CHUNKS
    assert (holds(upstream, ONE), tiers(cache), holds(upstream, other)) == (0, [], 2)
    cache.delete()
    assert (holds(upstream, other), tiers(cache, other)) == (0, [])


def test_many_readers_of_one_prompt_are_one_fetch(pair: Pair) -> None:
    upstream, sidecar = pair.upstream, pair.sidecar
    big = prompt(layout("wide", wide=True), 8 * 16, seed=3)
    with Client(upstream.address, deadline=30.0, registry=CollectorRegistry()) as client:
        client.namespace(big.layout).put(big.tokens, big.kv, quality="raw")
    hashes = [ref.hash for ref in big.refs]
    together = threading.Barrier(6)
    answers: list[list[bytes]] = []

    def read() -> None:
        together.wait(30)
        answers.append(kv.fetch(sidecar.store, big.layout, hashes))

    readers = [threading.Thread(target=read) for _ in range(6)]
    sidecar.channel  # noqa: B018 - made once, before the threads use it
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert answers == [[big.blob(at) for at in range(8)]] * 6
    assert pair.counted(upstream)["reads.host"] == 8, "each object was read there once"
    seen = pair.counted(sidecar)
    assert seen["upstream_coalesced.fetch"] > 0
    assert seen["reads.upstream"] + seen["reads.host"] == 6 * 8


def test_a_prefetched_prompt_is_in_memory(pair: Pair, cache_of: Callable[..., Namespace]) -> None:
    cache_of(pair.upstream.address).put(ONE.tokens, ONE.kv, quality="high")
    cache = cache_of(pair.sidecar.address)
    hint = cache.prefetch([*ONE.tokens, *range(16)], quality="low")
    assert (hint.held, hint.under_way) == (0, CHUNKS + 1)
    wait_until(lambda: counters(pair.sidecar)["prefetched_chunks.missed"] == 1, "the last chunk is nowhere")
    assert pair.counted(pair.sidecar)["prefetched_chunks.read"] == CHUNKS
    assert tiers(cache) == ["host"] * CHUNKS
    assert {chunk.quality for chunk in cache.lookup(ONE.tokens).chunks} == {Quality.HIGH}, "whole, whatever was hinted"
    assert (cache.prefetch(ONE.tokens).held, cache.prefetch([]).held) == (CHUNKS, 0)


def test_a_hint_brings_a_prompt_from_disk_to_memory(start_node: StartNode, tmp_path: Path) -> None:
    """Of any node, with or without upstream."""
    flags = ("--disk-path", str(tmp_path / "disk"), "--disk-capacity", "64MiB", "--host-capacity", "64MiB")
    first = start_node(*flags)
    with Client(first.address, registry=CollectorRegistry()) as client:
        client.namespace(LAYOUT).put(ONE.tokens, ONE.kv, quality="raw", durable=True, deadline=20.0)
    first.kill()
    second = start_node(*flags)
    with Client(second.address, deadline=20.0, registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        assert tiers(cache) == ["disk"] * CHUNKS
        assert cache.prefetch(ONE.tokens).under_way == CHUNKS
        wait_until(lambda: tiers(cache) == ["host"] * CHUNKS, "it is in memory")


def test_the_cache_outlives_the_engine(pair: Pair, cache_of: Callable[..., Namespace]) -> None:
    sidecar = pair.sidecar
    engine = (
        "import os, sys; from kvstore_client import Client; from prompts import layout, prompt; "
        f"one = prompt(layout(), {CHUNKS * 16}, seed=1); "
        f"cache = Client({sidecar.address!r}, deadline=20.0).namespace(one.layout); "
        "print(cache.put(one.tokens, one.kv, quality='raw').stored, flush=True); os.kill(os.getpid(), 9)"
    )
    support = Path(__file__).resolve().parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", engine], capture_output=True, text=True, timeout=60, check=False,
        env=clean_environment(PYTHONPATH=str(support)),
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (-9, str(CHUNKS)), done.stderr
    assert_read(cache_of(sidecar.address))


def test_a_sidecar_with_a_disk_is_warm_when_it_is_started_again(
    pair: Pair, start_sidecar: Callable[..., NodeProcess], cache_of: Callable[..., Namespace], tmp_path: Path
) -> None:
    """And has sent what was on its way when it was stopped."""
    flags = ("--disk-path", str(tmp_path / "disk"), "--disk-capacity", "64MiB")
    first = start_sidecar(pair.upstream.address, *flags)
    cache_of(first.address).put(ONE.tokens, ONE.kv, quality="raw", durable=True)
    assert first.stop() == 0
    assert holds(pair.upstream, ONE) == CHUNKS
    second = start_sidecar("127.0.0.1:1", *flags)
    cache = cache_of(second.address)
    assert tiers(cache) == ["disk"] * CHUNKS
    assert_read(cache)


def test_two_upstreams_share_the_prompts_as_a_client_of_both_would_have_it(
    start_node: StartNode, start_sidecar: Callable[..., NodeProcess], cache_of: Callable[..., Namespace]
) -> None:
    nodes = [start_node("--host-capacity", "64MiB") for _ in range(2)]
    addresses = [node.address for node in nodes]
    prompts = [prompt(LAYOUT, CHUNKS * 16, seed) for seed in range(10, 18)]
    direct, sidecar = cache_of(*addresses), start_sidecar(",".join(addresses), "--upstream-write", "through")
    cache = cache_of(sidecar.address)
    for number, each in enumerate(prompts):
        (cache if number % 2 else direct).put(each.tokens, each.kv, quality="raw")
    placed = [[holds(node, each) for node in nodes] for each in prompts]
    assert all(sorted(found) == [0, CHUNKS] for found in placed), placed
    assert len({tuple(found) for found in placed}) == 2, "each node has some"
    for each in prompts:
        assert_read(direct, each)
        assert_read(cache, each)
    # More of a prompt whose start is held: the offer does not name its first chunk, and it goes to the same node.
    whole = prompt(LAYOUT, 2 * CHUNKS * 16, seed=10)
    longer = Prompt(LAYOUT, prompts[1].tokens + whole.tokens[: CHUNKS * 16], whole.kv)
    assert cache.put(longer.tokens, longer.kv, quality="raw").have == CHUNKS
    assert len(direct.lookup(longer.tokens).chunks) == 2 * CHUNKS


def test_profiles_pass_through(
    pair: Pair, start_sidecar: Callable[..., NodeProcess], cache_of: Callable[..., Namespace]
) -> None:
    profile = transform_profile(LAYOUT)
    cache_of(pair.sidecar.address, profile=profile).put(ONE.tokens, ONE.kv, quality="medium")
    wait_until(lambda: holds(pair.upstream, ONE) == CHUNKS, "it arrives behind the put")
    direct, direct_tokens = cache_of(pair.upstream.address).get(ONE.tokens)
    assert direct_tokens == len(ONE.tokens), "the profile is upstream, too"
    fresh = start_sidecar(pair.upstream.address)
    through, tokens = cache_of(fresh.address).get(ONE.tokens)
    assert tokens == len(ONE.tokens)
    assert same(through, direct)
    loaded = cache_of(fresh.address).load_profile(profile.profile_id)
    assert loaded is not None
    assert loaded.to_bytes() == profile.to_bytes()


# An upstream that lies.

HELD = Held.of(LAYOUT, 4, seed=5)
FOREIGN = Held.of(LAYOUT, 4, seed=6)


def flipped(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


#: What comes instead of the second object, and what is counted.
LIES: dict[str, tuple[Callable[[], Iterable[Answer]], str]] = {
    "damaged": (lambda: pieces(1, flipped(HELD.blobs[1])), "integrity_failures.upstream.checksum_mismatch"),
    "foreign": (lambda: pieces(1, FOREIGN.blobs[1]), "integrity_failures.upstream.identity_mismatch"),
    "cut short": (lambda: list(pieces(1, HELD.blobs[1], size=512))[:-1], "fetch.protocol"),
    "out of place": (lambda: pieces(2, HELD.blobs[2]), "fetch.protocol"),
    "too large": (lambda: pieces(1, HELD.blobs[1], object_bytes=1 << 40), "fetch.protocol"),
    "no message": (lambda: [b"\xff\xff"], "fetch.protocol"),
}


def test_what_a_liar_sends_is_a_miss_and_counted(
    start_sidecar: Callable[..., NodeProcess], cache_of: Callable[..., Namespace]
) -> None:
    second: Callable[[], Iterable[Answer]] = tuple

    def fetch(request: pb.FetchRequest, context: object) -> Iterator[Answer]:
        """Only the first object of a prompt is what it should be."""
        if request.chunk_hashes.startswith(HELD.refs[0].hash):
            yield from pieces(0, HELD.blobs[0])
            yield from second()

    with HostileServer(lookup=HELD.lookup, fetch=fetch) as liar:
        sidecar = start_sidecar(liar.address)
        cache = cache_of(sidecar.address)
        for name, (lie, counter) in LIES.items():
            second, before = lie, counters(sidecar)
            got, tokens = cache.get(HELD.tokens)
            assert tokens == 16, f"{name}: what came before it counts"
            assert same(got, HELD.kv[:, :, :16])
            told = counters(sidecar) - before
            assert sum(count for each, count in told.items() if each.endswith(counter)) == 1, (name, told)
            assert kv.stat(sidecar.store).objects == 1, f"{name}: nothing bad is kept"
            sidecar.admin.Evict(admin_pb2.EvictRequest(), timeout=10)


def test_impossible_lookups_are_misses_and_counted(
    start_sidecar: Callable[..., NodeProcess], cache_of: Callable[..., Namespace]
) -> None:
    lies = iter([
        pb.LookupResponse(tokens=[16] * 9, quality=[0] * 9, provenance=[0] * 9, stored_bytes=[1] * 9),
        pb.LookupResponse(tokens=[16], quality=[0, 0], provenance=[0], stored_bytes=[1]),
        pb.LookupResponse(tokens=[16], quality=[99], provenance=[0], stored_bytes=[1]),
        pb.LookupResponse(tokens=[0], quality=[0], provenance=[0], stored_bytes=[1]),
    ])  # fmt: skip

    def lie(request: pb.LookupRequest, context: object) -> pb.LookupResponse:
        return next(lies) if request.chunk_hashes else pb.LookupResponse()

    with HostileServer(lookup=lie) as liar:
        sidecar = start_sidecar(liar.address)
        cache = cache_of(sidecar.address)
        assert [tiers(cache, ONE) for _ in range(4)] == [[]] * 4
        assert counters(sidecar)[f"upstream_failures.{liar.address}.lookup.protocol"] == 4


def test_identical_lookups_under_way_are_one(start_sidecar: Callable[..., NodeProcess]) -> None:
    asked, go_on = Counter[int](), threading.Event()

    def slow(request: pb.LookupRequest, context: object) -> pb.LookupResponse:
        if request.chunk_hashes:
            asked["lookup"] += 1  # type: ignore[index]
            go_on.wait(20)
        return HELD.lookup(request, context)  # type: ignore[arg-type]

    with HostileServer(lookup=slow) as node:
        sidecar = start_sidecar(node.address, "--upstream-timeout-ms", "20000")
        hashes = [ref.hash for ref in HELD.refs]
        found: list[int] = []
        callers = [
            threading.Thread(target=lambda: found.append(len(kv.lookup(sidecar.store, LAYOUT, hashes))))
            for _ in range(5)
        ]
        sidecar.channel  # noqa: B018 - made once, before the threads use it
        for caller in callers:
            caller.start()
        wait_until(lambda: counters(sidecar)["upstream_coalesced.lookup"] == 4, "four wait for the first")
        go_on.set()
        for caller in callers:
            caller.join()
        assert (found, sum(asked.values())) == ([4] * 5, 1)


# The command.


def test_a_sidecar_listens_where_its_user_finds_it(pair: Pair, tmp_path: Path) -> None:
    environment = clean_environment(XDG_RUNTIME_DIR=str(tmp_path / "run"))
    with subprocess.Popen(
        [KVSTORE, "sidecar", "--upstream", pair.upstream.address, "--host-capacity", "16MiB"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=environment,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["addresses"] == [f"unix:{tmp_path}/run/kvstore/sidecar.sock"]
            assert (tmp_path / "run" / "kvstore").stat().st_mode & 0o777 == 0o700
            told = subprocess.run(
                [KVSTORE, "admin", "stat", "--json", "--target", ready["addresses"][0]], capture_output=True, check=True
            )
            assert json.loads(told.stdout)["upstreams"] == [{"address": pair.upstream.address, "state": "closed"}]
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "a sidecar needs nodes to ask"),
        (["--upstream", "nowhere"], "bad target 'nowhere'"),
        (["--upstream", "unix:/x/s.sock", "--listen", "unix:///x/s.sock"], "where this node listens"),
        (["--upstream", "a:1", "--upstream-write", "sometimes"], "--upstream-write"),
    ],
)
def test_a_sidecar_that_cannot_be_says_why(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run(["sidecar", *arguments]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1


def test_a_folder_that_others_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "kvstore").mkdir()
    (tmp_path / "kvstore").chmod(0o777)
    assert run(["sidecar", "--upstream", "127.0.0.1:1"]) == ExitCode.USAGE
    assert "others may write there" in capsys.readouterr().err


def test_doctor_asks_upstream(pair: Pair) -> None:
    def told(target: str) -> tuple[int, dict[str, str]]:
        done = subprocess.run(
            [KVSTORE, "admin", "doctor", "--only", "upstream", "--json"], capture_output=True, timeout=60, check=False,
            env=clean_environment(KVSTORE_UPSTREAM=target, KVSTORE_NODE_ID="here", KVSTORE_UPSTREAM_TIMEOUT_MS="60000"),
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout)["findings"][0]

    code, finding = told(pair.upstream.address)
    assert (code, finding["level"]) == (0, "ok")
    assert "node upstream" in finding["found"]
    code, finding = told("127.0.0.1:1")
    assert (code, finding["level"]) == (1, "fail")
    assert "correct upstream" in finding["fix"]
