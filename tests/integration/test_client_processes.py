"""Clients among loops, threads and processes: many at once, forked, closed, and at a process's end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from client_prompts import CHUNK, DEADLINE_S, names, new_layout, prompt
from hostile_server import Answer, Context, Held, HostileServer, hang, holds_nothing, never
from kv_objects import small_layout
from kv_strategies import bits
from node_process import NodeProcess, clean_environment
from polling import wait_until
from prometheus_client import CollectorRegistry

from kvstore_client import AsyncClient, Client, ClientClosed, KVLayout, Namespace, Unavailable

StartNode = Callable[..., NodeProcess]


# Loops and threads


async def test_twenty_concurrent_gets(shared: NodeProcess) -> None:
    layout = new_layout()
    async with AsyncClient(shared.address, strict=True, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        prompts = [prompt(layout, 1 + seed % 4, seed=seed) for seed in range(20)]
        await asyncio.gather(*(cache.put(tokens, kv, quality="lossless") for tokens, kv in prompts))
        for got, (_, kv) in zip(await asyncio.gather(*(cache.get(t) for t, _ in prompts)), prompts, strict=True):
            assert bits(got[0]) == bits(kv)


def round_trips(cache: Namespace, layout: KVLayout, seed: int) -> bool:
    tokens, kv = prompt(layout, 2, seed=seed)
    cache.put(tokens, kv, quality="lossless")
    return bits(cache.get(tokens)[0]) == bits(kv)


def test_one_client_in_eight_threads(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda seed: round_trips(cache, layout, seed), range(40)))


async def test_the_synchronous_client_inside_a_running_loop(client: Client) -> None:
    assert asyncio.get_running_loop().is_running()
    layout = new_layout()
    assert round_trips(client.namespace(layout), layout, 1)


def test_two_clients_at_once(shared: NodeProcess, start_node: StartNode) -> None:
    other_node = start_node("--host-capacity", "64MiB")
    layout = new_layout()
    tokens, kv = prompt(layout, 2)
    with (
        Client(shared.address, strict=True, deadline=DEADLINE_S) as one,
        Client(shared.address, strict=True, deadline=DEADLINE_S) as two,
        Client(other_node.address, strict=True, deadline=DEADLINE_S) as elsewhere,
    ):
        one.namespace(layout).put(tokens, kv, quality="raw")
        assert two.namespace(layout).get(tokens)[1] == 2 * CHUNK
        assert elsewhere.namespace(layout).get(tokens)[1] == 0
        one.close()
        assert bits(two.namespace(layout).get(tokens)[0]) == bits(kv)


async def test_closed_is_closed(shared: NodeProcess) -> None:
    layout = new_layout()
    tokens, kv = prompt(layout, 1)
    client = Client(shared.address)
    cache = client.namespace(layout)
    cache.put(tokens, kv)
    for _ in range(2):
        client.close()
    calls: list[Callable[[], Any]] = [
        lambda: cache.lookup(tokens), lambda: cache.get(tokens), lambda: cache.put(tokens, kv), cache.delete,
        client.stat, lambda: client.namespace(layout).get(tokens),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ClientClosed):
            call()
    unused = AsyncClient(shared.address)
    await unused.aclose()
    with pytest.raises(ClientClosed):
        await unused.stat()


# The process around it


def run_script(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(text), *arguments],
        capture_output=True, text=True, timeout=60, env=clean_environment(), check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "client.close()", "client.close(); client.close()", "del cache, client"])
def test_a_process_ends_cleanly(shared: NodeProcess, end: str) -> None:
    script = """
        import sys
        import numpy as np
        from kvstore_client import Client, KVLayout
        layout = KVLayout.uniform(model=sys.argv[2], revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                  dtype="float16", chunk_tokens=16)
        client = Client(sys.argv[1], strict=True, deadline=20.0)
        cache = client.namespace(layout)
        kv = np.ones((2, 2, 64, 2, 16), np.float16)
        cache.put(list(range(64)), kv)
        out, n = cache.get(list(range(64)))
        print(n)
        """
    done = run_script(textwrap.dedent(script) + end, shared.address, next(names))
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\n", "")


@pytest.mark.slow
def test_a_process_ends_while_a_call_hangs() -> None:
    """In a thread that nobody joins; the deadline would be far away."""
    with HostileServer(lookup=never) as server:
        done = run_script(
            """
            import sys, threading
            import numpy as np
            from kvstore_client import Client, KVLayout
            layout = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                      dtype="float16", chunk_tokens=16)
            cache = Client(sys.argv[1], deadline=1000.0).namespace(layout)
            call = threading.Thread(target=cache.get, args=(list(range(64)),), daemon=True)
            call.start()
            call.join(0.5)
            print(call.is_alive())
            """,
            server.address,
        )
    assert server.calls == ["Lookup"]
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.slow
def test_a_forked_child_is_told_so_and_does_not_hang(shared: NodeProcess) -> None:
    done = run_script(
        """
        import os, sys
        from kvstore_client import Client, InvalidArgument, KVLayout
        layout = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                  dtype="float16", chunk_tokens=16)
        client = Client(sys.argv[1], strict=True, deadline=20.0)
        client.stat()
        child = os.fork()
        if child == 0:
            for each in (client, Client(sys.argv[1])):
                try:
                    each.namespace(layout).get(list(range(64)))
                except InvalidArgument as error:
                    print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        client.stat()
        """,
        shared.address,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "a client was used before this process was forked"
    ] * 2


@pytest.mark.slow
def test_clients_made_in_many_threads_at_once_share_one_loop(shared: NodeProcess) -> None:
    done = run_script(
        """
        import sys, threading
        import numpy as np
        from kvstore_client import Client, KVLayout
        sys.setswitchinterval(1e-6)
        layout = KVLayout.uniform(model=sys.argv[2], revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                  dtype="float16", chunk_tokens=16)
        kv = np.ones((2, 2, 64, 2, 16), np.float16)
        together, found = threading.Barrier(8), []
        def work(seed):
            together.wait()
            with Client(sys.argv[1], strict=True, deadline=20.0) as client:
                tokens = [seed] * 64
                client.namespace(layout).put(tokens, kv)
                found.append(client.namespace(layout).get(tokens)[1])
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(found, [thread.name for thread in threading.enumerate()].count("kvstore-client"))
        """,
        shared.address, next(names),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{[64] * 8} 1\n"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("where", ["Lookup", "Fetch", "Put"])
def test_closing_ends_the_calls_of_other_threads(where: str, strict: bool) -> None:
    """As if the node had gone away, wherever they are; nothing is raised that is not ours."""
    held = Held.of(small_layout(), 2, seed=1)
    lookup = {"Lookup": never, "Fetch": held.lookup, "Put": holds_nothing}[where]
    with HostileServer(lookup=lookup, fetch=never_an_object, put=never_an_object) as server:
        client = Client(server.address, deadline=1000.0, strict=strict, registry=CollectorRegistry())
        cache = client.namespace(held.layout)
        calls: dict[str, list[Callable[[], Any]]] = {
            "Lookup": [lambda: cache.lookup(held.tokens).tokens, lambda: cache.get(held.tokens)[1]],
            "Fetch": [lambda: cache.get(held.tokens)[1]],
            "Put": [lambda: cache.put(held.tokens, held.kv).tokens],
        }
        with ThreadPoolExecutor(2) as threads:
            ends = [threads.submit(call) for call in calls[where]]
            wait_until(lambda: server.calls.count(where) == len(ends), "the calls are under way")
            client.close()
            if strict:
                assert [type(end.exception(5)) for end in ends] == [Unavailable] * len(ends)
            else:
                assert [end.result(5) for end in ends] == [0] * len(ends)


async def test_a_cancelled_call_is_cancelled_also_where_its_client_is_closed_at_once() -> None:
    held = Held.of(small_layout(), 2, seed=1)
    with HostileServer(lookup=never) as server:
        client = AsyncClient(server.address, deadline=1000.0, registry=CollectorRegistry())
        call = asyncio.ensure_future(client.namespace(held.layout).get(held.tokens))
        await asyncio.to_thread(wait_until, lambda: server.calls == ["Lookup"], "the call is under way")
        call.cancel()
        await client.aclose()
        with pytest.raises(asyncio.CancelledError):
            await call


def never_an_object(request: Any, context: Context) -> Iterator[Answer]:
    hang(context)
    yield from ()
