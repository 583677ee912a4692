"""The one map between the node's error codes and gRPC status.

Several codes share a status, so the exact one travels beside it in the trailing metadata `kvstore-code`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import grpc

from kvstore.errors import Code, KvStoreError

CODE_METADATA = "kvstore-code"

STATUS_OF_CODE: Mapping[Code, grpc.StatusCode] = {
    Code.CONFIG: grpc.StatusCode.FAILED_PRECONDITION,
    Code.LISTEN: grpc.StatusCode.FAILED_PRECONDITION,
    Code.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    Code.STREAM_STALLED: grpc.StatusCode.ABORTED,
    Code.DISK_UNUSABLE: grpc.StatusCode.FAILED_PRECONDITION,
    Code.UPSTREAM_AWAY: grpc.StatusCode.UNAVAILABLE,
    Code.TIER_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.TIER_FAILED: grpc.StatusCode.UNAVAILABLE,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
}


def code_of(status: grpc.StatusCode, trailing_metadata: Iterable[tuple[str, str | bytes]]) -> Code | None:
    """The code that a node answered with; None where the status is gRPC's own or from a later version."""
    for key, value in trailing_metadata:
        if key == CODE_METADATA:
            try:
                code = Code(value)
            except ValueError:
                return None
            return code if STATUS_OF_CODE[code] is status else None
    return None


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: KvStoreError) -> NoReturn:
    """Ends the RPC with the error's status, one line of detail and its exact code."""
    status = STATUS_OF_CODE[error.code]
    await context.abort(status, str(error).replace("\n", " "), ((CODE_METADATA, error.code.value),))
    raise AssertionError("abort returned")
