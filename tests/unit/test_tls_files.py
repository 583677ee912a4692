"""The keys tls_* and upstream_tls_*, and a client's TLS: one line for each mistake, which says what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority, Certificate
from prometheus_client import CollectorRegistry

from kvstore.config import load_config
from kvstore.engine.upstream_open import upstream_peers
from kvstore.errors import ConfigError
from kvstore.metrics import NodeMetrics
from kvstore.service.tls import open_tls
from kvstore_client import TLS, Client, InvalidArgument


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pem") / "authority")


@pytest.fixture(scope="module")
def files(authority: Authority) -> dict[str, Path]:
    one, other = authority.certificate("one"), authority.certificate("other")
    locked, garbage = one.key.with_name("locked.key"), one.key.with_name("garbage.pem")
    subprocess.run(
        ["openssl", "ec", "-in", one.key, "-aes128", "-passout", "pass:secret", "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    garbage.write_bytes(bytes(range(256)))
    return {
        "cert": one.cert, "key": one.key, "ca": authority.ca, "other": other.key, "locked": locked, "garbage": garbage,
        "absent": one.key.with_name("absent.pem"), "folder": one.key.parent,
    }  # fmt: skip


def problem(**flags: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(None, flags, {})
    (found,) = raised.value.problems
    return found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tls_cert": "c"}, "tls_cert and tls_key belong together: set both or none"),
        ({"tls_key": "k"}, "tls_cert and tls_key belong together: set both or none"),
        ({"tls_client_ca": "c"}, "set tls_cert and tls_key, too"),
        ({"upstream_tls_ca": "c"}, "set without upstream"),
        ({"upstream": "a:1", "upstream_tls_cert": "c", "upstream_tls_key": "k"}, "set without upstream_tls_ca"),
        ({"upstream": "a:1", "upstream_tls_ca": "c", "upstream_tls_key": "k"}, "belong together"),
        ({"upstream": "a:1", "upstream_tls_name": "n"}, "set without upstream_tls_ca"),
    ],
)
def test_keys_that_do_not_fit_together(flags: dict[str, str], said: str) -> None:
    assert said in problem(**flags)


@pytest.mark.parametrize(
    ("cert", "key", "client_ca", "said"),
    [
        ("absent", "key", None, "tls_cert {absent} cannot be used: No such file or directory: name PEM files"),
        ("folder", "key", None, "tls_cert {folder} cannot be used: Is a directory"),
        ("cert", "absent", None, "tls_key {absent} cannot be used: No such file or directory"),
        (
            "cert",
            "other",
            None,
            "tls_cert {cert} with tls_key {other} cannot be used: the key is not the certificate's",
        ),
        ("cert", "locked", None, "tls_key {locked} cannot be used: not PEM, or not of the right kind, or a key with"),
        ("garbage", "key", None, "tls_cert {garbage} with tls_key {key} cannot be used: not PEM"),
        ("key", "cert", None, "cannot be used: not PEM"),
        ("cert", "key", "absent", "tls_client_ca {absent} cannot be used: No such file or directory"),
        ("cert", "key", "garbage", "tls_client_ca {garbage} cannot be used: not PEM"),
        ("cert", "key", "key", "tls_client_ca {key} cannot be used: not PEM"),
    ],
)
def test_files_of_a_node(files: dict[str, Path], cert: str, key: str, client_ca: str | None, said: str) -> None:
    flags = {"tls_cert": files[cert], "tls_key": files[key], "tls_client_ca": files.get(client_ca or "")}
    with pytest.raises(ConfigError) as raised:
        open_tls(load_config(None, flags, {}), CollectorRegistry())
    (found,) = raised.value.problems
    assert said.format(**files) in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        (("absent", None, None), "TLS ca {absent} cannot be used: No such file"),
        (("garbage", None, None), "TLS ca {garbage} cannot be used: not PEM"),
        (("ca", "cert", None), "belong together"),
        (("ca", "cert", "other"), "TLS cert and key {cert} cannot be used: the key is not the certificate's"),
    ],
)
async def test_files_of_a_client_and_of_a_sidecar(
    files: dict[str, Path], tls: tuple[str, str | None, str | None], said: str
) -> None:
    ca, cert, key = (None if each is None else files[each] for each in tls)
    assert ca is not None
    with pytest.raises(InvalidArgument) as mistaken:
        Client("127.0.0.1:1", tls=TLS(ca, cert, key), registry=CollectorRegistry())
    assert said.format(**files) in str(mistaken.value)
    if said == "belong together":
        return  # the configuration said so before
    config = load_config(
        None,
        {"upstream": "127.0.0.1:1", "upstream_tls_ca": ca, "upstream_tls_cert": cert, "upstream_tls_key": key},
        {},
    )
    with pytest.raises(ConfigError) as raised:
        upstream_peers(config, NodeMetrics(CollectorRegistry()))
    assert said.format(**files) in str(raised.value)


def test_an_empty_name_is_none(authority: Authority) -> None:
    with pytest.raises(InvalidArgument, match="server_name is empty"):
        Client("127.0.0.1:1", tls=authority.trusted(server_name=""), registry=CollectorRegistry())


@pytest.mark.parametrize(
    ("target", "name"), [("host.example:7070", "host.example"), ("[::1]:7070", "::1"), ("127.0.0.1:1", "127.0.0.1")]
)
def test_the_name_that_a_certificate_is_for(authority: Authority, target: str, name: str) -> None:
    assert authority.trusted().load().name_for(target) == name
    assert authority.trusted(server_name="other.example").load().name_for(target) == "other.example"


def test_a_certificate_is_read_again_when_its_files_have_changed(authority: Authority, tmp_path: Path) -> None:
    """A file that is away for a moment changes nothing."""
    place = Certificate(tmp_path / "c.pem", tmp_path / "c.key")
    registry = CollectorRegistry()

    def install(name: str) -> None:
        made = authority.certificate(name)
        place.key.write_bytes(made.key.read_bytes())
        place.cert.write_bytes(made.cert.read_bytes())

    def reloads(outcome: str) -> float:
        return registry.get_sample_value("kvstore_tls_reloads_total", {"outcome": outcome}) or 0.0

    install("first")
    tls = open_tls(load_config(None, {"tls_cert": place.cert, "tls_key": place.key}, {}), registry)
    assert tls is not None
    first = tls.context()
    assert tls.context() is first
    place.key.unlink()
    assert tls.context() is first
    assert tls.context() is first
    assert (reloads("loaded"), reloads("failed")) == (0, 1), "once for each change"
    install("second")
    second = tls.context()
    assert second is not first
    assert tls.context() is second
    assert (reloads("loaded"), reloads("failed")) == (1, 1)
