"""With a certificate everything is encrypted, and half of a pair is refused before anything listens."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from parbake.errors import ServerNotFound
from parbake.testing import serving
from parbake.transports import client
from parbake.transports.grpc.messages import INFERENCE
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


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def authority(folder: Path, name: str) -> tuple[Path, Path]:
    """Certificate and key of an authority."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-keyout", key, "-out", cert, "-subj", f"/CN={name}",
    )  # fmt: skip
    return cert, key


def client_of(folder: Path, name: str, signed_by: tuple[Path, Path]) -> tuple[Path, Path]:
    """Certificate and key of a client."""
    cert, key, asked = folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}.csr"
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key,
        "-out", asked, "-subj", f"/CN={name}",
    )  # fmt: skip
    openssl(
        "x509", "-req", "-in", asked, "-CA", signed_by[0], "-CAkey", signed_by[1], "-CAcreateserial",
        "-days", "2", "-out", cert,
    )  # fmt: skip
    return cert, key


def test_only_clients_with_a_certificate_of_the_authority_are_let_in(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    cert, key = pair
    ours, others = authority(tmp_path, "ours"), authority(tmp_path, "others")
    known, unknown = client_of(tmp_path, "known", ours), client_of(tmp_path, "unknown", others)
    asked = request(SCALED, infer((1.0, 2.0)))

    def context(of: tuple[Path, Path] | None) -> ssl.SSLContext:
        found = ssl.create_default_context(cafile=cert)
        if of is not None:
            found.load_cert_chain(*of)
        return found

    def over_grpc(of: tuple[Path, Path] | None) -> str:
        credentials = grpc.ssl_channel_credentials(
            cert.read_bytes(), *((of[1].read_bytes(), of[0].read_bytes()) if of is not None else ())
        )
        with grpc.secure_channel(
            server.grpc, credentials, options=[("grpc.ssl_target_name_override", "localhost")]
        ) as channel:
            try:
                channel.unary_unary(f"/{INFERENCE}/ServerLive")(b"", timeout=10)
            except grpc.RpcError as error:
                return str(error.code().name)
        return "OK"

    with serving(
        bundle.path, workers=1, grpc=True, tls_cert=cert, tls_key=key, tls_client_ca=ours[0]
    ) as server:
        with connected(server.port, tls=context(known)) as here:
            assert here.send(asked).reply().json()["outputs"][0]["data"] == [2.0, 4.0]
        for stranger in (None, unknown):
            # In TLS 1.3 a client learns after its side of the handshake that it is not let in.
            with (
                pytest.raises((ssl.SSLError, ConnectionError, EOFError)),
                connected(server.port, tls=context(stranger)) as here,
            ):
                here.send(asked).reply()
        assert over_grpc(known) == "OK"
        assert over_grpc(None) == over_grpc(unknown) == "UNAVAILABLE"
        with connected(server.port, tls=context(known)) as here:
            assert here.send(asked).reply().status == 200
        assert "Traceback" not in server.log()


def test_an_authority_that_is_none_is_refused_at_the_start(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    cert, key = pair
    client_cert, _ = client_of(tmp_path, "client", authority(tmp_path, "ours"))
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"tls_client_ca": cert}, "tls_client_ca is given without tls_cert and tls_key"),
        ({"tls_cert": cert, "tls_key": key, "tls_client_ca": tmp_path / "none.pem"}, "no file"),
        ({"tls_cert": cert, "tls_key": key, "tls_client_ca": nonsense}, "the certificate cannot be used"),
        (
            {"tls_cert": cert, "tls_key": key, "tls_client_ca": client_cert},
            "is no certificate of an authority",
        ),
    ]
    for options, message in refusals:
        with pytest.raises(ServerNotFound, match=message), serving(bundle.path, **options):
            pass
