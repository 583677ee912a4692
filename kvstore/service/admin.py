"""The Admin service: what an operator does to a node beyond reading it."""

from __future__ import annotations

from typing import Any

import grpc

from kvstore.engine.node import Node
from kvstore.service import requests
from kvstore_proto.v1 import admin_pb2 as pb
from kvstore_proto.v1 import admin_pb2_grpc as pb_grpc


class AdminService(pb_grpc.AdminServicer):
    def __init__(self, node: Node) -> None:
        self._node = node

    async def Evict(  # noqa: N802
        self, request: pb.EvictRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EvictResponse:
        objects, freed = await self._node.operations.evict(
            requests.tier_or_all(request.tier),
            request.bytes,
            requests.hashes(request.chunk_hashes) or None,
        )
        return pb.EvictResponse(objects=objects, bytes=freed)

    async def Pin(  # noqa: N802
        self, request: pb.PinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PinResponse:
        pinned, refused = self._node.operations.pin(requests.some_hashes(request.chunk_hashes), request.seconds)
        return pb.PinResponse(objects=pinned, refused=refused)

    async def Unpin(  # noqa: N802
        self, request: pb.UnpinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PinResponse:
        return pb.PinResponse(objects=self._node.operations.unpin(requests.hashes(request.chunk_hashes) or None))
