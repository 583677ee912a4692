"""The keys tls_* of a node's configuration: whom its TCP listeners are for."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, model_validator


class TlsConfig(BaseModel):
    """Part of `NodeConfig`. Without `tls_cert` nothing is encrypted."""

    tls_cert: Path | None = Field(
        default=None, description="this node's certificate (PEM, with the chain below the CA); none: no TLS"
    )
    tls_key: Path | None = Field(default=None, description="its private key (PEM, without passphrase)")
    tls_client_ca: Path | None = Field(
        default=None, description="certificates (PEM) that sign the clients', who must have one then; none: all come in"
    )

    @model_validator(mode="after")
    def _certificates_fit_together(self) -> TlsConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca is set without tls_cert: set tls_cert and tls_key, too, or unset it")
        return self
