"""What every call of our services passes through: errors become gRPC status, calls are counted and timed.

Calls of other services on the same server (health, reflection) pass unseen, so that a health watcher, which
never ends, does not hold up a shutdown.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import CollectorRegistry, Gauge, Histogram

from kvstore.errors import KvStoreError
from kvstore.service.status import STATUS_OF_CODE, abort

OUR_METHODS = "/kvstore.v1."
ERROR_ANSWER_S_MAX = 1.0
_LOOK_S = 0.01  # between two looks at what is in flight, while the node waits to stop
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:  # generic in the stubs alone
    Handler = grpc.RpcMethodHandler[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    Interceptor = grpc.aio.ServerInterceptor


class Boundary(Interceptor):
    def __init__(self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._in_flight = 0
        self._lock = threading.Lock()
        self._seconds = Histogram(
            "kvstore_rpc_seconds", "Duration of calls, whole streams included, by gRPC status.",
            ("method", "status"), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        Gauge("kvstore_rpcs_in_flight", "Calls being served now.", registry=registry).set_function(
            lambda: self._in_flight
        )

    async def wait_idle(self) -> None:
        """Returns when no call of ours is in flight."""
        while self._in_flight:  # noqa: ASYNC110 - calls end in any thread
            await asyncio.sleep(_LOOK_S)

    def begin(self) -> None:
        """A call has begun; `end` follows. Any thread may say so, without waking the event loop for it."""
        with self._lock:
            self._in_flight += 1

    def end(self, method: str, status: str, seconds: float) -> None:
        with self._lock:
            self._in_flight -= 1
        self._seconds.labels(method, status).observe(seconds)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OUR_METHODS):
            return handler
        return self._wrap(handler, method.rsplit("/", 1)[1])

    def _wrap(self, handler: Any, method: str) -> Handler:
        kind, make = {
            (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
            (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
            (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
        }[handler.request_streaming, handler.response_streaming]
        inner = getattr(handler, kind)

        async def observed(request: Any, context: Context) -> Any:
            async with self._call(method, context):
                return await inner(request, context)

        wrapped: Handler = make(observed, handler.request_deserializer, handler.response_serializer)
        return wrapped

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator[None]:
        started = self._clock()
        status = grpc.StatusCode.UNKNOWN.name
        self.begin()
        try:
            yield
            status = grpc.StatusCode.OK.name
        except asyncio.CancelledError:
            status = grpc.StatusCode.CANCELLED.name
            raise
        except KvStoreError as error:
            status = STATUS_OF_CODE[error.code].name
            await self._answer(context, error)
        finally:
            self.end(method, status, self._clock() - started)

    async def _answer(self, context: Context, error: KvStoreError) -> None:
        """Sends the error; a peer that does not even read that is cut off, so that its call holds nothing."""
        try:
            await asyncio.wait_for(abort(context, error), ERROR_ANSWER_S_MAX)
        except asyncio.TimeoutError:
            raise asyncio.CancelledError from None
