"""A certificate for 127.0.0.1 that signs itself, for `bench.transfer`'s routes over TLS."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from pathlib import Path


def certificate(folder: Path) -> tuple[Path, Path] | None:
    """(certificate, key) in `folder`; None, and one line that says so, where there is no openssl."""
    if shutil.which("openssl") is None:
        print("bench: nothing over TLS: openssl is not installed", file=sys.stderr)
        return None
    cert, key = folder / "bench.pem", folder / "bench.key"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def context(cert: Path) -> ssl.SSLContext:
    """Of a client that trusts it."""
    return ssl.create_default_context(cafile=cert)
