"""One bulk connection to a node, as the thread that drives it sees it: blocking calls, each with a deadline."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple

import grpc
from google.protobuf.message import DecodeError

from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded, ProtocolViolation, Unavailable, from_status
from kvstore_client.tls import LoadedTLS
from kvstore_client.transports.blob import Blob, Buffers
from kvstore_client.transports.wanted import Wants
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2, transfer_pb2
from kvstore_proto.v1.bulk import BadFrame, Header, Kind, hello
from kvstore_proto.v1.bulk_socket import BulkSocket, ConnectionEnded, NoProgress

ABSTRACT = "unix-abstract:"
#: Beyond a call's deadline, so that a slow clock does not take a place from who still reads it.
HOLD_MARGIN_MS = 1_000
HOLD_MS_MAX = 2**32 - 1  # as the protocol can say it
_PEER_CREDENTIALS = struct.Struct("iII")
_STATUS = {status.value[0]: status for status in grpc.StatusCode}


class Memory(NamedTuple):
    """A node's memory, mapped to be read. `identity`: of the file behind it."""

    identity: tuple[int, int]
    view: memoryview


class BulkConnection:
    """`node`: the seed, also its name in errors. `tls`: over TCP, who listens at `address` must have the certificate of
    that seed, whoever told of the address. Only `shutdown` may be called while another call runs.

    Every call raises Unavailable (it ended), DeadlineExceeded, ProtocolViolation, or what the node answered; after any
    of them the connection is good for nothing."""

    def __init__(self, node: str, address: str, ticket: bytes, deadline: Deadline, tls: LoadedTLS | None) -> None:
        self.node = node
        self.memory: Memory | None = None
        self._owed = False  # RELEASED, to be received before the answer to the next request
        try:
            self._socket = BulkSocket(_connected(node, address, deadline, tls), deadline.remaining())
        except (OSError, ValueError) as error:  # ValueError: what the node said is no address
            raise Unavailable("the node's bulk path cannot be reached", node=node, details=str(error)) from None
        self._end = weakref.finalize(self, self._socket.close)  # also of a client that is dropped rather than closed
        try:
            with self._failures(deadline):
                # The hello carries its own header.
                self._socket.send_bytes(hello(ticket))
                self._socket.receive(Kind.WELCOME)
        except BaseException:
            self.close()
            raise

    def share_memory(self, known: Memory | None, deadline: Deadline) -> None:
        """Lets the node say where objects are instead of sending them; for unix sockets. `known`: an earlier mapping,
        used again where it is of the same memory."""
        with self._failures(deadline):
            self._socket.send(Kind.MAP, 0)
            payload, descriptor = self._socket.receive_descriptor(Kind.MAPPED)
            try:
                size = transfer_pb2.SharedMemory.FromString(payload).bytes
                found = os.fstat(descriptor)
                identity = found.st_dev, found.st_ino
                if known is None or known.identity != identity or len(known.view) != size:
                    if not 0 < size <= found.st_size:
                        raise BadFrame("the memory is not as large as it is said to be")
                    known = Memory(identity, memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)))
                self.memory = known
            except (OSError, ValueError) as error:
                raise BadFrame(f"the node's memory cannot be mapped: {error}") from None
            finally:
                os.close(descriptor)

    def fetch(
        self, wanted: Wants, lease_id: bytes, deadline: Deadline, buffers: Buffers, ahead: threading.Semaphore,
        hand_over: Callable[[Blob], None], count_received: Callable[[int], None],
    ) -> bool:  # fmt: skip
        """Hands over whole objects in the order of `wanted.chunks`, possibly fewer, each as soon as it is here; one of
        `ahead` is taken for each that is received and given back when it is done with.

        Whether some are in the node's memory: then `release` tells if what was read of it is good."""
        request = transfer_pb2.BulkFetch(
            request=wanted.request(lease_id), places=self.memory is not None,
            hold_ms=_hold_ms(deadline.remaining()),
        )  # fmt: skip
        in_place = False
        with self._failures(deadline):
            self._ask(Kind.FETCH, request.SerializeToString(), deadline)
        for found in self.objects(wanted, deadline):
            if isinstance(found, list):
                in_place = True
                for place in found:
                    count_received(len(place))
                    hand_over(Blob(place, in_place=True))
                continue
            if not ahead.acquire(timeout=deadline.remaining()):
                raise DeadlineExceeded("the call's deadline passed", seconds=deadline.seconds)
            buffer, view = buffers.take(found)
            self.receive_into(view, deadline, count_received)
            hand_over(Blob(view, partial(_done, buffers, buffer, ahead)))
        return in_place

    def get(
        self, lookup: store_pb2.LookupRequest, quality: Quality, min_quality: Quality, deadline: Deadline, hold_s: float
    ) -> store_pb2.LookupResponse:  # fmt: skip
        """What there is of a chain; `objects` of it follow, up to the first that is worse than `min_quality`."""
        request = transfer_pb2.BulkGet(
            lookup=lookup, quality=quality, min_quality=min_quality, places=self.memory is not None,
            hold_ms=_hold_ms(hold_s),
        )  # fmt: skip
        with self._failures(deadline):
            self._ask(Kind.GET, request.SerializeToString(), deadline)
            found = self._socket.receive(Kind.FOUND, Kind.END, until=deadline.remaining)
            payload = self._payload(found, deadline)
            if found.kind is Kind.FOUND:
                return store_pb2.LookupResponse.FromString(payload)
            self._check_end(payload)
            raise BadFrame("a get ended before it was answered")

    def objects(self, wanted: Wants, deadline: Deadline) -> Iterator[list[memoryview] | int]:
        """Objects in the order of `wanted.chunks`, possibly fewer: where the next ones lie in the node's memory, or how
        many bytes of the next are to be received by `receive_into` before more is asked for. Some in memory: then
        `release` tells if what was read there is good."""
        at = 0
        while True:
            places: list[memoryview] = []
            with self._failures(deadline):
                found = self._socket.receive(Kind.OBJECT, Kind.PLACES, Kind.END, until=deadline.remaining)
                if found.kind is Kind.END:
                    self._check_end(self._payload(found, deadline))
                    return
                if at == len(wanted.chunks) or found.index != at:
                    raise BadFrame(f"object {found.index} came out of place")
                if found.kind is Kind.PLACES:
                    places = self._in_place(self._payload(found, deadline), wanted, at)
                elif not 0 < found.length <= wanted.bytes_max(at):
                    raise BadFrame(f"no object of the layout has {found.length} bytes")
            if places:
                at += len(places)
                yield places
            else:
                at += 1
                yield found.length

    def receive_into(self, view: memoryview, deadline: Deadline, count_received: Callable[[int], None]) -> None:
        with self._failures(deadline):
            self._socket.receive_into(view, after=count_received, until=deadline.remaining)

    def release(self, deadline: Deadline) -> None:
        """After a fetch with places: they are not needed any more. When this returns, all of them were good until
        now.

        A node ends a connection before it lets go of what it holds for it: of one that is found open, nothing was let
        go, and its answer need not be waited for."""
        with self._failures(deadline):
            was_open = self._socket.is_open()
            self._socket.send(Kind.RELEASE, 0)
            self._owed = True
            if not was_open:
                self._receive_owed(deadline)

    def offer(self, offer: store_pb2.PutOffer, deadline: Deadline) -> store_pb2.PutResponse:
        with self._failures(deadline):
            self._ask(Kind.OFFER, store_pb2.PutRequest(offer=offer).SerializeToString(), deadline)
            return self._answer(Kind.VERDICTS, deadline)

    def send(
        self, objects: Sequence[tuple[int, bytes | memoryview]], deadline: Deadline, count_sent: Callable[[int], None]
    ) -> None:  # fmt: skip
        """(index in the offer, the object) of each that is wanted, in the order of the offer."""
        with self._failures(deadline):
            for index, blob in objects:
                if deadline.remaining() <= 0:
                    raise NoProgress
                self._socket.limit(deadline.remaining())
                self._socket.send(Kind.OBJECT, index, memoryview(blob))
                count_sent(len(blob))

    def commit(self, deadline: Deadline) -> store_pb2.PutResponse:
        with self._failures(deadline):
            self._socket.send(Kind.COMMIT, 0)
            return self._answer(Kind.RESULTS, deadline)

    def shutdown(self) -> None:
        """From any thread: the call under way ends, as Unavailable."""
        self._socket.shutdown()

    def close(self) -> None:
        self._end()

    def _ask(self, kind: Kind, payload: bytes, deadline: Deadline) -> None:
        self._socket.send(kind, 0, payload)
        self._receive_owed(deadline)

    def _receive_owed(self, deadline: Deadline) -> None:
        if self._owed:
            self._socket.receive(Kind.RELEASED, until=deadline.remaining)
            self._owed = False

    def _in_place(self, payload: bytes, wanted: Wants, at: int) -> list[memoryview]:
        told, left = transfer_pb2.Places.FromString(payload), len(wanted.chunks) - at
        if self.memory is None or not 0 < len(told.offset) == len(told.object_bytes) <= left:
            raise BadFrame(f"{len(told.offset)} places came where {left} objects were to come")
        memory, places = self.memory.view, []
        for index, (offset, size) in enumerate(zip(told.offset, told.object_bytes, strict=True), at):
            if not 0 < size <= wanted.bytes_max(index):
                raise BadFrame(f"no object of the layout has {size} bytes")
            if offset + size > len(memory):
                raise BadFrame("a place lies outside the node's memory")
            places.append(memory[offset : offset + size])
        return places

    def _payload(self, found: Header, deadline: Deadline) -> bytes:
        """Of a control frame, all of it in time."""
        data = memoryview(bytearray(found.length))
        self._socket.receive_into(data, until=deadline.remaining)
        return bytes(data)

    def _answer(self, expected: Kind, deadline: Deadline) -> store_pb2.PutResponse:
        found = self._socket.receive(expected, Kind.END, until=deadline.remaining)
        payload = self._payload(found, deadline)
        if found.kind is Kind.END:
            self._check_end(payload)
            raise BadFrame("a put ended before it was answered")
        return store_pb2.PutResponse.FromString(payload)

    def _check_end(self, payload: bytes) -> None:
        ended = transfer_pb2.Ended.FromString(payload)
        if ended.status:
            raise from_status(_STATUS.get(ended.status, grpc.StatusCode.UNKNOWN), ended.details, self.node)

    def _failures(self, deadline: Deadline) -> _Failures:
        self._socket.limit(deadline.remaining())
        return _Failures(self.node, deadline)


class _Failures:
    """Makes typed errors of what a socket raises inside."""

    __slots__ = ("_deadline", "_node")

    def __init__(self, node: str, deadline: Deadline) -> None:
        self._node, self._deadline = node, deadline

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NoProgress) or (isinstance(error, ConnectionEnded) and self._deadline.remaining() <= 0):
            # It may have been shut down for that.
            raise DeadlineExceeded("the node did not answer in time", node=self._node) from None
        if isinstance(error, ConnectionEnded):
            raise Unavailable("the bulk connection ended", node=self._node, details=str(error)) from None
        if isinstance(error, BadFrame | DecodeError):
            raise ProtocolViolation("the bulk path was answered out of place", node=self._node, details=str(error)
                                    ) from None  # fmt: skip


def _hold_ms(seconds: float) -> int:
    return min(int(seconds * 1000) + HOLD_MARGIN_MS, HOLD_MS_MAX)


def _connected(node: str, address: str, deadline: Deadline, tls: LoadedTLS | None) -> socket.socket:
    """Raises OSError, ValueError."""
    if address.startswith(("unix:", ABSTRACT)):
        connected = _unix_connected(address, deadline.remaining())
        if tls is not None and not node.startswith("unix:") and not _is_own(connected):
            connected.close()
            raise PermissionError(f"{address} is not of this user: who listens there cannot be verified")
        return connected
    host, _, port = address.rpartition(":")
    connected = socket.create_connection((host.strip("[]"), int(port)), deadline.remaining())
    if tls is None:
        return connected
    try:
        connected.settimeout(max(deadline.remaining(), 0.001))  # of the whole handshake
        return tls.context.wrap_socket(
            connected, server_hostname=tls.name_for(address if node.startswith("unix:") else node)
        )
    except BaseException:
        connected.close()
        raise


def _unix_connected(address: str, timeout_s: float) -> socket.socket:
    abstract = address.startswith(ABSTRACT)
    path = "\0" + address.removeprefix(ABSTRACT) if abstract else address.removeprefix("unix:")
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connecting.settimeout(timeout_s)
        connecting.connect(path)
    except OSError:
        connecting.close()
        raise
    return connecting


def _is_own(connected: socket.socket) -> bool:
    """Whether this user or root listens there. A node elsewhere tells names that any user of this machine may have
    taken: what its certificate says holds for TCP alone."""
    _, user, _ = _PEER_CREDENTIALS.unpack(
        connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    )
    return user in (0, os.geteuid())


def _done(buffers: Buffers, buffer: object, ahead: threading.Semaphore) -> None:
    buffers.give_back(buffer)  # type: ignore[arg-type]
    ahead.release()
