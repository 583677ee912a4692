"""A peer of a node's bulk path, frame by frame; and what the node tells of it."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

from kv_objects import small_layout
from kv_strategies import random_kv
from node_process import NodeProcess

from kvstore_proto.v1 import transfer_pb2
from kvstore_proto.v1.bulk import VERSION, Kind, hello
from kvstore_proto.v1.bulk_socket import BulkSocket
from kvstore_proto.v1.transfer_pb2_grpc import TransferStub

LAYOUT = small_layout("bulk", layers=8, head_dim=64)  # 64 KiB a chunk
CHUNKS = 24
TOKENS = list(range(CHUNKS * LAYOUT.chunk_tokens))
KV = random_kv(LAYOUT, len(TOKENS), 3)


def calls(node: NodeProcess, method: str, status: str = "OK") -> int:
    found = re.search(rf'kvstore_rpc_seconds_count{{method="{method}",status="{status}"}} (\d+)', node.metrics())
    return int(found.group(1)) if found else 0


def gauge(node: NodeProcess, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)", node.metrics(), re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def connect(node: NodeProcess, *, local: bool = False) -> socket.socket:
    """A connection that nobody has said hello on."""
    answer = ticket_of(node)
    address = next(each for each in answer.addresses if each.startswith("unix-abstract:") == local)
    if local:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect("\0" + address.removeprefix("unix-abstract:"))
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ticket_of(node: NodeProcess) -> transfer_pb2.ConnectResponse:
    stub = TransferStub(node.channel)  # type: ignore[no-untyped-call]
    answer: transfer_pb2.ConnectResponse = stub.Connect(transfer_pb2.ConnectRequest(version=VERSION), timeout=10)
    return answer


@contextmanager
def let_in(node: NodeProcess, *, local: bool = False) -> Iterator[BulkSocket]:
    with closing(BulkSocket(connect(node, local=local), 10.0)) as connection:
        connection.send_bytes(hello(ticket_of(node).ticket))
        connection.receive(Kind.WELCOME)
        yield connection
        connection.shutdown()
