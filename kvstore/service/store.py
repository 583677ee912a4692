"""The Store service: checked requests in, the node's answers out. Streams live in `fetch.py` and `put.py`."""

from __future__ import annotations

from typing import Any

import grpc

from kvstore.engine.node import Node
from kvstore.service import requests, wire
from kvstore.service.fetch import fetch
from kvstore.service.put import put
from kvstore.service.streams import StreamMetrics
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1 import store_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]
LIST_ANSWER_BYTES_MAX = 2 << 20  # well inside framing's message limit, whatever the models are called


class StoreService(pb_grpc.StoreServicer):
    def __init__(self, node: Node, *, stream_idle_s: float, metrics: StreamMetrics) -> None:
        self._node = node
        self._stream_idle_s = stream_idle_s
        self._metrics = metrics

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:  # noqa: N802
        found = await self._node.find(*requests.lookup(request))
        return wire.lookup_response(found)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:  # noqa: N802
        return pb.RenewResponse(lease_ms=self._node.renew(requests.lease_id(request.lease_id), request.lease_ms))

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> None:  # noqa: N802
        await fetch(self._node, request, context, stream_idle_s=self._stream_idle_s, metrics=self._metrics)

    async def Put(self, request_iterator: Any, context: Context) -> None:  # noqa: N802
        await put(self._node, context, stream_idle_s=self._stream_idle_s, metrics=self._metrics)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:  # noqa: N802
        objects, freed = await self._node.delete(
            requests.namespace(request.namespace_id),
            requests.hashes(request.chunk_hashes) or None,
            requests.part(request.part),
        )
        return pb.DeleteResponse(objects=objects, bytes=freed)

    async def Prefetch(self, request: pb.PrefetchRequest, context: Context) -> pb.PrefetchResponse:  # noqa: N802
        held, under_way = self._node.prefetch(
            requests.namespace(request.namespace_id),
            requests.hashes(request.chunk_hashes),
            requests.part(request.part),
            requests.quality(request.quality),
            requests.first_chunk(request.first_chunk_hash),
        )
        return pb.PrefetchResponse(held=held, under_way=under_way)

    async def Stat(self, request: pb.StatRequest, context: Context) -> pb.StatResponse:  # noqa: N802
        return wire.stat_response(self._node.stat())

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:  # noqa: N802
        namespace_id = requests.namespace_or_all(request.namespace_id)
        prefix = requests.hash_prefix(request.hash_prefix)
        limit = requests.list_limit(request.limit)
        token = requests.page_token(request.page_token)
        while True:
            entries, next_token = await self._node.operations.list_objects(namespace_id, prefix, limit, token)
            response = wire.list_response(entries, next_token)
            if limit == 1 or response.ByteSize() <= LIST_ANSWER_BYTES_MAX:
                return response
            limit //= 2

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> None:  # noqa: N802
        namespace_id = requests.namespace_or_all(request.namespace_id)
        hashes = requests.hashes(request.chunk_hashes) or None
        async for progress in self._node.operations.verify(namespace_id, hashes):
            await context.write(wire.verify_response(progress))
