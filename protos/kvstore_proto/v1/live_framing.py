"""Frames the bulk messages of the Live service (`LiveWriteRequest`, `FollowResponse`) as framing.py does Store's."""

from __future__ import annotations

from typing import Any

import grpc

from kvstore_proto.v1 import live_pb2 as pb
from kvstore_proto.v1 import live_pb2_grpc as pb_grpc
from kvstore_proto.v1.framing import parser, serialize

SERVICE = pb.DESCRIPTOR.services_by_name["Live"].full_name
parse_write_request = parser(pb.LiveWriteRequest)
parse_follow_response = parser(pb.FollowResponse)


class FramedLiveStub:
    """`Write` takes and `Follow` yields `Framed` messages."""

    def __init__(self, channel: Any) -> None:
        self.Write = channel.stream_stream(
            f"/{SERVICE}/Write", request_serializer=serialize,
            response_deserializer=pb.LiveWriteResponse.FromString,
        )  # fmt: skip
        self.Follow = channel.unary_stream(
            f"/{SERVICE}/Follow", request_serializer=pb.FollowRequest.SerializeToString,
            response_deserializer=parse_follow_response,
        )  # fmt: skip


def add_framed_live_servicer(servicer: pb_grpc.LiveServicer, server: Any) -> None:
    """Registers `servicer`, whose Write receives and whose Follow sends `Framed` messages."""
    handlers = {
        "Write": grpc.stream_stream_rpc_method_handler(
            servicer.Write, request_deserializer=parse_write_request,
            response_serializer=pb.LiveWriteResponse.SerializeToString,
        ),
        "Follow": grpc.unary_stream_rpc_method_handler(
            servicer.Follow, request_deserializer=pb.FollowRequest.FromString, response_serializer=serialize
        ),
    }  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
