"""A node as the admin commands see it: synchronous calls with one deadline, errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore_client.errors import InvalidArgument, explained
from kvstore_client.tls import TLS
from kvstore_proto.v1 import admin_pb2_grpc, store_pb2_grpc
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import CHANNEL_OPTIONS

PAGE_OBJECTS = 1000
_USAGE = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}


@dataclass(frozen=True)
class Target:
    """A node to ask. `str()` is its address."""

    address: str
    tls: TLS | None = None

    def __str__(self) -> str:
        return self.address


class Remote:
    """Stubs of one node; pass `timeout=remote.deadline_s` to every call."""

    def __init__(self, channel: grpc.Channel, deadline_s: float) -> None:
        self.store = store_pb2_grpc.StoreStub(channel)  # type: ignore[no-untyped-call]
        self.admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        self.channel = channel
        self.deadline_s = deadline_s

    def objects(self, *, namespace_id: bytes = b"", hash_prefix: str = "") -> Iterator[pb.ObjectEntry]:
        """Every stored object, page by page, whose hash starts with these hex digits."""
        digits = hash_prefix.lower()
        request = pb.ListRequest(
            namespace_id=namespace_id, limit=PAGE_OBJECTS, hash_prefix=bytes.fromhex(digits[: len(digits) // 2 * 2])
        )
        while True:
            page = self.store.List(request, timeout=self.deadline_s)
            yield from (entry for entry in page.objects if entry.chunk_hash.hex().startswith(digits))
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


@contextmanager
def connect(target: Target, deadline_s: float) -> Iterator[Remote]:
    """Raises CommandFailed for every failed call made inside."""
    with _channel(target) as channel:
        try:
            yield Remote(channel, deadline_s)
        except grpc.RpcError as error:
            raise _failure(target, deadline_s, error) from None


def _channel(target: Target) -> grpc.Channel:
    if target.tls is None or target.address.startswith("unix:"):
        return grpc.insecure_channel(target.address, options=CHANNEL_OPTIONS)
    try:
        tls = target.tls.load()
    except InvalidArgument as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None
    return grpc.secure_channel(target.address, tls.credentials, options=[*CHANNEL_OPTIONS, *tls.options])


def _failure(target: Target, deadline_s: float, error: grpc.RpcError) -> CommandFailed:
    assert isinstance(error, grpc.Call), "a finished RPC's error is also its call"
    status, details = error.code(), " ".join(explained(str(error.details())).split())
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CommandFailed(
            f"{target} did not answer within {deadline_s:g} s: check the node or raise --deadline",
            ExitCode.UNREACHABLE,
        )
    if status is grpc.StatusCode.UNAVAILABLE:
        return CommandFailed(
            f"{target} cannot be reached: is the node running there? ({details})", ExitCode.UNREACHABLE
        )
    return CommandFailed(
        f"{target}: {status.name}: {details}", ExitCode.USAGE if status in _USAGE else ExitCode.PROBLEM
    )
