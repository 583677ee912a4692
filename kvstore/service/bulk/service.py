"""The Transfer service: lets a gRPC client on to the bulk path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from kvstore.service.bulk.listener import ABSTRACT
from kvstore.service.bulk.tickets import TICKET_MS, Tickets
from kvstore_proto.v1 import transfer_pb2 as pb
from kvstore_proto.v1 import transfer_pb2_grpc as pb_grpc
from kvstore_proto.v1.bulk import VERSION

_EVERYWHERE = ("0.0.0.0", "[::]", "::")  # noqa: S104


class TransferService(pb_grpc.TransferServicer):
    """`addresses`: where the bulk path listens; none: there is no such path."""

    def __init__(self, tickets: Tickets, addresses: Sequence[str]) -> None:
        self._tickets = tickets
        self._addresses = [_as_seen_by_clients(address) for address in addresses]

    async def Connect(  # noqa: N802
        self, request: pb.ConnectRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ConnectResponse:
        if request.version < VERSION or not self._addresses:
            return pb.ConnectResponse()
        return pb.ConnectResponse(
            version=VERSION, ticket=self._tickets.issue(), ticket_ms=TICKET_MS, addresses=self._addresses
        )


def _as_seen_by_clients(address: str) -> str:
    """A node that listens everywhere is where its client found it."""
    if address.startswith(("unix:", ABSTRACT)):
        return address
    host, _, port = address.rpartition(":")
    return f":{port}" if host in _EVERYWHERE else address
