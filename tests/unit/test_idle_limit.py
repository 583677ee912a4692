"""IdleLimit: fires without progress, never with it, and never swallows anybody else's cancellation."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import StreamStalled
from kvstore.service.idle import IdleLimit


async def test_no_progress_is_a_stall() -> None:
    with pytest.raises(StreamStalled, match="no progress"), IdleLimit(0.02):
        await asyncio.Event().wait()
    await asyncio.sleep(0)  # the task is not left cancelled


async def test_progress_keeps_it_alive() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    with IdleLimit(0.2) as idle:
        while loop.time() < began + 0.5:
            idle.progress()
            await asyncio.sleep(0)
    assert loop.time() > began + 0.2


async def test_a_cancellation_from_outside_passes_through() -> None:
    entered = asyncio.Event()

    async def stream() -> None:
        with IdleLimit(60):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stream())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), IdleLimit(60):
        raise KeyError("mine")
