"""Certificates for tests: an authority of our own and what it signs, as PEM files."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvstore_client import TLS

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path


class Authority:
    """Writes into `folder`, which it makes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.ca, self._key = folder / "ca.pem", folder / "ca.key"
        _openssl("req", "-x509", "-keyout", self._key, "-out", self.ca, "-subj", f"/CN={folder.name}", *_NEW_KEY)

    def certificate(self, name: str, alternative: str = "IP:127.0.0.1") -> Certificate:
        """For a host, as "IP:127.0.0.1" or "DNS:name"."""
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        _openssl("req", "-keyout", made.key, "-out", request, "-subj", f"/CN={name}", *_NEW_KEY)
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial",
            "-extfile", extensions, "-days", "2", "-out", made.cert,
        )  # fmt: skip
        return made

    def trusted(self, own: Certificate | None = None, server_name: str | None = None) -> TLS:
        """What a client is given that trusts this authority, and has a certificate of its `own`."""
        cert, key = (None, None) if own is None else (own.cert, own.key)
        return TLS(self.ca, cert, key, server_name)


def _openssl(command: str, *arguments: str | Path) -> None:
    done = subprocess.run(["openssl", command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"openssl {command} failed: {done.stderr.strip()}")
