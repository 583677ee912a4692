"""The options by which a command is told of a node to ask, said once for all commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvstore_client.tls import TLS

Address = Annotated[
    str, typer.Option("--target", envvar="KVSTORE_TARGET", help="Node to ask: host:port or unix:/path.")
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca", envvar="KVSTORE_TARGET_TLS_CA", help="Certificates that sign the node's (default: no TLS)."
    ),
]
TlsCert = Annotated[
    Path | None, typer.Option("--tls-cert", envvar="KVSTORE_TARGET_TLS_CERT", help="Our certificate, if it wants one.")
]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", envvar="KVSTORE_TARGET_TLS_KEY", help="Its private key.")]
TlsName = Annotated[
    str | None,
    typer.Option("--tls-name", envvar="KVSTORE_TARGET_TLS_NAME", help="What the node's is for (default: its host)."),
]


def _option(name: str, default: str | None, annotation: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_TLS = [
    _option("tls_ca", None, TlsCa), _option("tls_cert", None, TlsCert), _option("tls_key", None, TlsKey),
    _option("tls_name", None, TlsName),
]  # fmt: skip
#: What a command's own parameter of this name stands for on the command line.
_STANDS_FOR = {"node": [_option("target", "127.0.0.1:7070", Address), *_TLS], "tls": _TLS}


def node_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command, all of whose parameters are keywords, with options in the place of `node: Target`, a node and TLS to
    it, or of `tls: TLS | None` alone. typer reads its options off a function's signature, and cannot group them."""
    # What is imported for types alone, so that `--help` stays quick, is nobody's option.
    own = inspect.signature(command, eval_str=True, locals={"Target": object, "TLS": object})
    options = [option for each in own.parameters.values() for option in _STANDS_FOR.get(each.name, [each])]

    @functools.wraps(command)
    def asking(**given: Any) -> None:
        from kvstore.cli.remote import Target

        tls = _checked_tls(*(given.pop(option.name) for option in _TLS))
        if "node" in own.parameters:
            given["node"] = Target(given.pop("target"), tls)
        else:
            given["tls"] = tls
        command(**given)

    asking.__signature__ = own.replace(parameters=options)  # type: ignore[attr-defined]
    asking.__annotations__ = {option.name: option.annotation for option in options}
    return asking


def _checked_tls(ca: Path | None, cert: Path | None, key: Path | None, name: str | None) -> TLS | None:
    """Raises CommandFailed."""
    from kvstore.cli.outcome import CommandFailed, ExitCode
    from kvstore_client.tls import TLS

    if ca is not None:
        return TLS(ca, cert, key, name)
    if (cert, key, name) != (None, None, None):
        raise CommandFailed("--tls-cert, --tls-key and --tls-name need --tls-ca: pass that, too", ExitCode.USAGE)
    return None
