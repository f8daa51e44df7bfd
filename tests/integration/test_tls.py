"""With a certificate everything is encrypted, and half of a pair is refused before anything listens."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from parbake.errors import ServerNotFound
from parbake.testing import serving
from parbake.transports import client
from tests.functions import write_scaled
from tests.sockets import connected, request
from tests.traffic import infer

SCALED = "/v2/models/scaled/infer"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_everything_is_encrypted(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    cert, key = pair
    context = ssl.create_default_context(cafile=cert)
    with serving(bundle.path, workers=2, tls_cert=cert, tls_key=key, max_body_bytes=10_000) as server:
        assert server.url.startswith("https://127.0.0.1:")
        for _ in range(4):
            with connected(server.port, tls=context) as here:
                assert isinstance(here.socket, ssl.SSLSocket)
                assert isinstance(here.socket, ssl.SSLSocket)
                assert here.socket.version() in ("TLSv1.2", "TLSv1.3")
                for row in [(1.0, 2.0), (3.0, 4.0)]:
                    reply = here.send(request(SCALED, infer(row))).reply()
                    assert reply.json()["outputs"][0]["data"] == [2 * row[0], 2 * row[1]]
                here.send(*(request(SCALED, infer((i, 1))) for i in range(20)))
                assert [here.reply().json()["outputs"][0]["data"][0] for _ in range(20)] == [
                    2.0 * i for i in range(20)
                ]
        with connected(server.port, tls=context) as here:
            assert here.send(request(SCALED, b"x" * 100_000)).reply().status == 413
        # The file by which commands find it says so, too.
        assert client.status(port=server.port).versions[0].name == "scaled"
        with connected(server.port) as plain:
            plain.send(request(SCALED, infer((1, 2))))
            assert plain.ends()
        old = ssl.create_default_context(cafile=cert)
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)), connected(server.port, tls=old):
            pass
        assert server.stop() == 0


def test_a_pair_that_does_not_fit_is_refused_at_the_start(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    cert, key = pair
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"tls_cert": cert, "tls_key": tmp_path / "none.pem"}, "no file"),
        ({"tls_cert": cert, "tls_key": nonsense}, "the certificate cannot be used"),
        ({"tls_cert": key, "tls_key": cert}, "the certificate cannot be used"),
        ({"tls_cert": cert}, "tls_cert is given without tls_key"),
    ]
    for options, message in refusals:
        with pytest.raises(ServerNotFound, match=message), serving(bundle.path, **options):
            pass
