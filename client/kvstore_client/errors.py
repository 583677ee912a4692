"""Everything a client can raise, as one tree.

    KvClientError
    ├── InvalidArgument      the caller's mistake (target, deadline, token count …); raised even when not strict
    ├── ClientClosed         the call came after close(); raised even when not strict
    ├── Unavailable          no node could be reached, or the connection was lost
    ├── DeadlineExceeded     the call's deadline passed
    ├── AccessDenied         the node does not let this credential do it
    ├── LimitExceeded        the node is full or busy, or a message exceeds its limits
    ├── RequestRefused       the node does not accept the request: usually a node of another version
    ├── ServerFailed         the node failed inside
    ├── ProtocolViolation    the peer's answer is not what the protocol says
    └── BadObject            the node sent an object that cannot be used
        ├── ObjectDamaged      checksum, length or structure is wrong
        ├── ObjectForeign      intact, but of another namespace, chunk, part or position
        ├── ObjectUnsupported  written by a later version
        ├── ProfileMissing     coded with a profile that no node has
        └── ProfileDamaged     coded with a profile that is stored damaged, is another one, or does not fit

A client that is not strict reports all but the first two as misses (or rejections), counted under `code`.
Mistakes in arrays, layouts and qualities are kvstore_codec's LayoutError and ValuesError, ValueErrors like
InvalidArgument.
"""

from __future__ import annotations

import re
from enum import Enum

import grpc

import kvstore_codec as codec


class ErrorCode(str, Enum):
    """Stable; also the `reason` label of the client's metrics."""

    INVALID_ARGUMENT = "invalid_argument"
    CLOSED = "closed"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    ACCESS_DENIED = "access_denied"
    LIMIT = "limit"
    REFUSED = "refused"
    SERVER = "server"
    PROTOCOL = "protocol"
    DAMAGED = "damaged"
    FOREIGN = "foreign"
    UNSUPPORTED = "unsupported"
    PROFILE_MISSING = "profile_missing"
    PROFILE_DAMAGED = "profile_damaged"


class KvClientError(Exception):
    """Root of this package's errors; `str()` is one line. `context` holds what was expected and found."""

    code: ErrorCode

    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message)
        self.context = context

    def __str__(self) -> str:
        details = ", ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.args[0]} ({details})" if details else str(self.args[0])


class InvalidArgument(KvClientError, ValueError):
    code = ErrorCode.INVALID_ARGUMENT


class ClientClosed(KvClientError):
    code = ErrorCode.CLOSED


class Unavailable(KvClientError):
    code = ErrorCode.UNAVAILABLE


class DeadlineExceeded(KvClientError):
    code = ErrorCode.DEADLINE


class AccessDenied(KvClientError):
    code = ErrorCode.ACCESS_DENIED


class LimitExceeded(KvClientError):
    code = ErrorCode.LIMIT


class RequestRefused(KvClientError):
    code = ErrorCode.REFUSED


class ServerFailed(KvClientError):
    code = ErrorCode.SERVER


class ProtocolViolation(KvClientError):
    code = ErrorCode.PROTOCOL


class BadObject(KvClientError):
    """Common base of what is wrong with an object; never raised itself."""

    code = ErrorCode.DAMAGED


class ObjectDamaged(BadObject):
    code = ErrorCode.DAMAGED


class ObjectForeign(BadObject):
    code = ErrorCode.FOREIGN


class ObjectUnsupported(BadObject):
    code = ErrorCode.UNSUPPORTED


class ProfileMissing(BadObject):
    code = ErrorCode.PROFILE_MISSING


class ProfileDamaged(BadObject):
    code = ErrorCode.PROFILE_DAMAGED


#: What each gRPC status of a failed call means to a caller.
ERROR_OF_STATUS: dict[grpc.StatusCode, type[KvClientError]] = {
    grpc.StatusCode.CANCELLED: Unavailable,  # we never cancel what we still wait for: the node is going away
    grpc.StatusCode.UNKNOWN: ServerFailed,
    grpc.StatusCode.INVALID_ARGUMENT: RequestRefused,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: RequestRefused,
    grpc.StatusCode.ALREADY_EXISTS: RequestRefused,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: RequestRefused,
    grpc.StatusCode.ABORTED: ServerFailed,
    grpc.StatusCode.OUT_OF_RANGE: RequestRefused,
    grpc.StatusCode.UNIMPLEMENTED: RequestRefused,
    grpc.StatusCode.INTERNAL: ServerFailed,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DATA_LOSS: ServerFailed,
}

_DETAILS_CHARACTERS_MAX = 200


def from_status(status: grpc.StatusCode, details: str | None, node: str) -> KvClientError:
    """The error of a call that ended with `status`; a stream that ended OK too early is a protocol violation."""
    kind = ERROR_OF_STATUS.get(status, ProtocolViolation)
    message = _MESSAGES.get(kind, "the node's answer is not what the protocol says")
    return kind(message, node=node, details=one_line(explained(details or "")))


def explained(details: str) -> str:
    """What gRPC says of a call, behind what it means where that is about TLS and nobody could tell."""
    meaning = next((words for sign, words in _TLS_SIGNS if sign.search(details)), None)
    return details if meaning is None else f"{meaning}: {details}"


def one_line(text: str) -> str:
    """What a peer wrote, as it may be shown and logged: short, printable, without line breaks."""
    text = "".join(character if character.isprintable() else " " for character in text[: 2 * _DETAILS_CHARACTERS_MAX])
    return " ".join(text.split())[:_DETAILS_CHARACTERS_MAX]


def from_codec(error: codec.ObjectError, node: str) -> BadObject:
    """The error of an object that the codec does not take."""
    kind = _KINDS.get(type(error), ObjectDamaged)
    return kind(f"the node sent a bad object: {error}", node=node)


_KINDS: dict[type[codec.ObjectError], type[BadObject]] = {
    codec.ForeignObject: ObjectForeign,
    codec.UnsupportedObject: ObjectUnsupported,
    codec.ProfileMissing: ProfileMissing,
}

#: In order: the first that is found.
_TLS_SIGNS = (
    (re.compile("Hostname Verification Check failed"), "the node's certificate is for another name"),
    (
        re.compile("CERTIFICATE_VERIFY_FAILED"),
        "the node's certificate is not signed by the CA that was given, or has ended",
    ),
    (re.compile("WRONG_VERSION_NUMBER"), "the node does not speak TLS"),
    (
        re.compile("failed to connect.*(Socket closed|Connection reset)"),
        "it hangs up at once: does it want TLS, or a client's certificate?",
    ),
)

_MESSAGES: dict[type[KvClientError], str] = {
    Unavailable: "the node cannot be reached",
    DeadlineExceeded: "the node did not answer in time",
    AccessDenied: "the node denies access",
    LimitExceeded: "the node is at a limit",
    RequestRefused: "the node refuses the request",
    ServerFailed: "the node failed",
}
