"""TLS to a node: what a caller names, and what gRPC and the bulk path make of it.

Both verify the same certificate for the same name; a node that cannot be verified is not talked to.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvstore_client.errors import InvalidArgument


@dataclass(frozen=True)
class TLS:
    """PEM files. `ca`: the certificates that sign the nodes'; no others are trusted. `cert`, `key`: this client's own,
    for nodes that ask for one. `server_name`: what the nodes' certificates must be for (default: the target's host).

    They are read when a client is made. Connections over unix sockets stay plain: those do not leave the machine."""

    ca: str | os.PathLike[str]
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def load(self) -> LoadedTLS:
        """Raises InvalidArgument for files that cannot be used."""
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument("TLS cert and key belong together: name both or none")
        if self.server_name == "":
            raise InvalidArgument("TLS server_name is empty: name what the certificate is for, or leave it out")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks certificates and names
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        what, path = "ca", self.ca
        try:
            context.load_verify_locations(os.fspath(self.ca))
            ca = Path(self.ca).read_bytes()
            cert = key = None
            if self.cert is not None and self.key is not None:
                what, path = "cert and key", self.cert
                context.load_cert_chain(self.cert, self.key, password=no_password)
                cert, key = Path(self.cert).read_bytes(), Path(self.key).read_bytes()
        except (OSError, TypeError, ValueError) as error:  # an SSLError is an OSError
            raise InvalidArgument(
                f"TLS {what} {path} cannot be used: {why_unusable(error)}: name PEM files that fit each other"
            ) from None
        return LoadedTLS(grpc.ssl_channel_credentials(ca, key, cert), context, self.server_name)


@dataclass(frozen=True)
class LoadedTLS:
    """`credentials` are gRPC's, `context` is the bulk path's."""

    credentials: grpc.ChannelCredentials
    context: ssl.SSLContext
    server_name: str | None

    @property
    def options(self) -> list[tuple[str, str]]:
        """Of a gRPC channel with these credentials."""
        return [] if self.server_name is None else [("grpc.ssl_target_name_override", self.server_name)]

    def name_for(self, target: str) -> str:
        """What the certificate of the node at `target`, "host:port", must be for; as gRPC has it."""
        return self.server_name if self.server_name is not None else target.rpartition(":")[0].strip("[]")


def no_password() -> str:
    """For keys with a passphrase: they are refused. Without it the terminal would be asked."""
    return ""


def why_unusable(error: Exception) -> str:
    """In few words why a file of certificates or a key could not be read. A key with a passphrase is told apart from
    nothing else that is no key."""
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is not the certificate's"
        return "not PEM, or not of the right kind, or a key with a passphrase"
    return str(getattr(error, "strerror", None) or error)
