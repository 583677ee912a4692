"""A get over a bulk connection: one request asks for the lookup and for the objects, one thread does all the rest.

That thread is the caller's own where the caller may block and a connection lies ready, which saves handing the call to
the event loop, to another thread, and back; else it is one of the client's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import KvClientError, Unavailable
from kvstore_client.receiving import Asked, Got, Receiving, Tools
from kvstore_client.transports.bulk_path import result_of


async def bulk_get(node: Node, asked: Asked, tools: Tools, found_by: Deadline, deadline: Deadline) -> Got | None:
    """None where there is no bulk path, or it broke before it brought anything. `found_by`: when the node has to have
    told what it holds, else it raises DeadlineExceeded, as it raises the typed error of what else is wrong until then.

    When it returns, raises or is cancelled, nothing writes to `asked.out` any more."""
    connection = await node.bulk.take(found_by)
    if connection is None:
        return None
    receiving = Receiving(node, connection, asked, tools, found_by, deadline)
    running = node.bulk.start(connection, receiving.run, deadline, node.bulk.gets)
    try:
        await _ended(running, receiving.stop)
        got = result_of(running, node.address)
    except KvClientError as error:
        connection.close()
        node.bulk.failed(error)
        if isinstance(error, Unavailable):  # such as a connection to a node that was started anew since
            return None
        raise
    except BaseException:
        connection.close()
        raise
    if (broken := receiving.broken) is not None:
        node.bulk.failed(broken)
    return _kept(node, receiving, got)


def direct_get(node: Node, asked: Asked, tools: Tools, found_by: Deadline, deadline: Deadline) -> Got | None:
    """The same in the calling thread, which it blocks. None also where no connection lies ready."""
    connection = node.bulk.ready.take()
    if connection is None:
        return None
    receiving = Receiving(node, connection, asked, tools, found_by, deadline)
    try:
        got = receiving.run()
    except KvClientError as error:
        connection.close()
        tools.loop.call_soon_threadsafe(node.bulk.failed, error)
        if isinstance(error, Unavailable):
            return None
        raise
    except BaseException:  # such as an interrupt of the calling thread
        connection.close()
        raise
    if (broken := receiving.broken) is not None:
        tools.loop.call_soon_threadsafe(node.bulk.failed, broken)
    return _kept(node, receiving, got)


def _kept(node: Node, receiving: Receiving, got: Got) -> Got | None:
    """None where it is better asked again, another way. Keeps the connection where all went well."""
    if receiving.broken is None and got.fetched.error is None:
        node.bulk.ready.give_back(receiving.connection)
        return got
    receiving.connection.close()
    if isinstance(receiving.broken, Unavailable) and not receiving.came:
        return None
    return got


async def _ended(running: asyncio.Future[Any], stop: Callable[[], None]) -> None:
    """Waits for `running`, and makes it stop where this is cancelled; it has ended in any case."""
    again: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            again = error
            stop()
    if again is not None:
        raise again
