"""The admin API and the model repository: changes by those who may make them, and by nobody else."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parbake.app.supervisor import Change
from parbake.errors import BundleTorn, NotAllowed, ServerNotFound, SettingsError
from parbake.settings import ServerSettings
from parbake.testing import Server, serving
from parbake.transports import client, statefile
from parbake.transports.admin import serve_admin
from tests.functions import write_scaled
from tests.sockets import connected, request
from tests.traffic import Call, answer, infer, once, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundles of the server are."""
    return tmp_path_factory.mktemp("admin")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Server]:
    """One server for all tests here: each leaves it as it was."""
    bundles = [write_scaled(folder / f"{name}.bundle", 2, name=name) for name in ("eta", "other")]
    with serving(
        *(bundle.path for bundle in bundles), workers=2, environment={"XDG_RUNTIME_DIR": str(folder)}
    ) as running:
        yield running


@pytest.fixture
def server(shared: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same, found by its file."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    versions = client.status(port=shared.port).versions
    assert [(version.name, version.bundle) for version in versions] == [
        ("eta", str(folder / "eta.bundle")),
        ("other", str(folder / "other.bundle")),
    ]
    return shared


def test_the_admin_api_needs_its_token(server: Server) -> None:
    running = statefile.find(server.port)
    url = running.admin_url
    assert len(running.token) >= 24
    assert once(url, "/admin/health").json() == {"live": True}
    for path in ("/admin/status", "/admin/reload", "/metrics", "/admin/models/eta/load", "/nowhere"):
        for authorization in ("", "Bearer wrong", f"Basic {running.token}", "Bearer \xe9"):
            noted = once(url, path, authorization=authorization)
            assert (noted.status, noted.json()["code"]) == (403, "not_allowed"), path
    status = once(url, "/admin/status", authorization=f"Bearer {running.token}").json()
    assert [version["name"] for version in status["versions"]] == ["eta", "other"]
    assert len(status["front_pids"]) == 2
    assert running.token not in json.dumps(status)


def test_a_taken_admin_port_is_an_error_with_a_remedy() -> None:
    nobody: Any = None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError) as caught:
            asyncio.run(serve_admin(nobody, nobody, ServerSettings(admin_port=port)))
    assert caught.value.message.startswith(f"cannot listen on 127.0.0.1:{port} for the admin API: ")
    assert caught.value.hint == "--admin-port 0 takes a free port"


def test_bad_requests_to_the_admin_api_are_refused_by_name(server: Server) -> None:
    running = statefile.find(server.port)
    token = {"authorization": f"Bearer {running.token}"}
    with Call(running.admin_url) as call:
        for path, body, status, code in [
            ("/admin/reload", b"{", 400, "malformed_body"),
            ("/admin/reload", b'{"what": 1}', 400, "invalid_input"),
            ("/admin/reload", b'{"changes": [{"name": "eta", "table": 7}]}', 400, "invalid_input"),
            ("/admin/reload", b'{"changes": [{"name": "nobody", "table": "x"}]}', 404, "model_not_found"),
            ("/admin/reload", b'{"changes": [{"bundle": "/nowhere"}]}', 422, "bundle_torn"),
            ("/admin/models/nobody/load", b"", 404, "model_not_found"),
            ("/admin/models/eta/train", b"", 404, "route_not_found"),
            ("/admin/status", b"", 405, "method_not_allowed"),
        ]:
            noted = call(path, body, token)
            assert (noted.status, noted.json()["code"]) == (status, code), path
        assert call("/admin/reload", b"x" * 2_000_000, token).status == 413


def test_load_and_unload_over_the_admin_api(server: Server) -> None:
    running = statefile.find(server.port)
    token = {"authorization": f"Bearer {running.token}"}
    with Call(running.admin_url) as admin:
        assert admin("/admin/models/eta/unload", b"", token).status == 200
        assert client.status(port=server.port).unloaded == ("eta",)
        assert once(server.url, "/v2/models/eta/infer", infer((1, 2))).status == 503
        assert admin("/admin/models/eta/load", b"", token).status == 200
        assert answer(once(server.url, "/v2/models/eta/infer", infer((1, 2)))) == [2.0, 4.0]


def test_the_repository_lists_unloads_and_loads(server: Server) -> None:
    # Over connections of their own, so that both fronts are asked.
    def index(body: bytes = b"") -> list[tuple[str, str]]:
        return [
            (item["name"], item["state"]) for item in once(server.url, "/v2/repository/index", body).json()
        ]

    assert index() == index(b"{}") == [("eta", "READY"), ("other", "READY")]
    assert (
        once(
            server.url, "/v2/repository/models/eta/unload", b'{"parameters": {"unload_dependents": true}}'
        ).status
        == 200
    )
    for _ in range(4):
        assert index() == [("other", "READY"), ("eta", "UNAVAILABLE")]
        assert index(b'{"ready": true}') == [("other", "READY")]
        for path in ("/v2/models/eta/infer", "/predict/eta"):
            noted = once(server.url, path, infer((1, 2)))
            assert (noted.status, noted.json()["code"]) == (503, "not_ready")
            assert noted.json()["hint"].startswith(
                "parbake reload eta, or POST /v2/repository/models/eta/load"
            )
            assert noted.headers["retry-after"] == "5"
        assert once(server.url, "/v2/models/eta/ready").status == 503
        assert once(server.url, "/v2/models/eta").status == 503
        assert answer(once(server.url, "/v2/models/other/infer", infer((1, 2)))) == [2.0, 4.0]
        assert once(server.url, "/v2/health/ready").status == 200
    # Again: nothing to do.
    assert once(server.url, "/v2/repository/models/eta/unload", b"").status == 200
    assert once(server.url, "/v2/repository/models/eta/load", b"").status == 200
    for _ in range(4):
        assert index() == [("eta", "READY"), ("other", "READY")]
        assert answer(once(server.url, "/v2/models/eta/infer", infer((1, 2)))) == [2.0, 4.0]


def test_reload_by_name_loads_what_was_unloaded_and_reload_of_everything_does_not(server: Server) -> None:
    assert once(server.url, "/v2/repository/models/eta/unload", b"").status == 200
    assert client.reload(port=server.port).changed == ()
    assert client.reload([Change("eta", mode="hybrid")], port=server.port).changed == ()
    assert client.status(port=server.port).unloaded == ("eta",)
    assert client.reload([Change("eta", mode="dynamic"), Change("eta")], port=server.port).changed == (
        "eta:1",
    )
    assert answer(once(server.url, "/v2/models/eta/infer", infer((1, 2)))) == [2.0, 4.0]


def test_the_status_counts_what_was_asked(server: Server) -> None:
    def asked() -> tuple[int, int]:
        eta = client.status(port=server.port).versions[0]
        return eta.requests, eta.errors

    requests, errors = asked()
    assert once(server.url, "/v2/models/eta/infer", infer((1, 2))).status == 200
    assert once(server.url, "/v2/models/eta/infer", b"{").status == 400
    assert asked() == (requests + 2, errors + 1)


def test_a_model_is_loaded_again_from_what_is_there_now(server: Server, folder: Path) -> None:
    write_scaled(folder / "eta.bundle", 5, name="eta", replace=True)
    try:
        # Not because another one is.
        assert once(server.url, "/v2/repository/models/other/load", b"").status == 200
        assert answer(once(server.url, "/v2/models/eta/infer", infer((1, 2)))) == [2.0, 4.0]
        assert once(server.url, "/v2/repository/models/eta/load", b"").status == 200
        assert answer(once(server.url, "/v2/models/eta/infer", infer((1, 2)))) == [5.0, 10.0]
    finally:
        write_scaled(folder / "eta.bundle", 2, name="eta", replace=True)
        assert once(server.url, "/v2/repository/models/eta/load", b"").status == 200


def test_nothing_is_loaded_that_was_never_configured_or_comes_over_the_network(server: Server) -> None:
    for name, status in [("nobody", 404), ("..%2F..%2Fetc", 404), ("a" * 500, 404)]:
        noted = once(server.url, f"/v2/repository/models/{name}/load", b"")
        assert (noted.status, noted.json()["code"]) == (status, "model_not_found")
    for parameters in ({"config": "{}"}, {"file:1/model.onnx": "AAAA"}):
        noted = once(
            server.url, "/v2/repository/models/eta/load", json.dumps({"parameters": parameters}).encode()
        )
        assert (noted.status, noted.json()["code"]) == (400, "invalid_input")
        assert "is not accepted over the network" in noted.json()["error"]
    assert once(server.url, "/v2/repository/models/eta/load", b"{").status == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"x_forwarded_for": "10.0.0.1"},
        {"via": "1.1 proxy"},
    ],
)
def test_a_page_in_a_browser_or_a_proxy_may_not_unload(server: Server, headers: dict[str, str]) -> None:
    noted = once(server.url, "/v2/repository/models/eta/unload", b"", **headers)
    assert (noted.status, noted.json()["code"]) == (403, "not_allowed")
    token = f"Bearer {statefile.find(server.port).token}"
    for action in ("unload", "load"):
        path = f"/v2/repository/models/eta/{action}"
        assert once(server.url, path, b"", authorization=token, **headers).status == 200


@pytest.mark.parametrize(("rule", "with_token"), [("token", 200), ("off", 403)])
def test_the_rule_for_the_repository_is_kept(tmp_path: Path, rule: str, with_token: int) -> None:
    bundle = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    with serving(bundle.path, workers=1, repository_api=rule, admin_token="secret") as server:
        path = "/v2/repository/models/eta/unload"
        assert once(server.url, path, b"").status == 403
        assert once(server.url, path, b"", authorization="Bearer secret").status == with_token
        # The index is for everybody.
        assert once(server.url, "/v2/repository/index", b"").status == 200


def test_a_server_that_is_open_to_others_lets_nobody_change_it_without_the_token(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    with serving(bundle.path, workers=1, host="0.0.0.0") as server:
        assert once(server.url, "/v2/repository/models/eta/unload", b"").status == 403
        assert answer(once(server.url, "/v2/models/eta/infer", infer((1, 2)))) == [2.0, 4.0]


def test_the_client_finds_the_server_and_passes_on_what_it_says(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    running = statefile.find()
    assert running.port == server.port
    generation = client.reload().generation
    new = write_scaled(tmp_path / "new.bundle", 7, name="eta")
    reloaded = client.reload([Change(bundle=str(new.path))], admin_url=running.admin_url, token=running.token)
    assert reloaded.changed == ("eta:1",)
    assert client.status().generation == reloaded.generation == generation + 1
    with pytest.raises(BundleTorn, match="no bundle at") as caught:
        client.reload([Change(bundle=str(tmp_path / "none"))])
    assert "parbake pack" in caught.value.hint
    assert client.reload([Change(bundle=str(folder / "eta.bundle"))]).changed == ("eta:1",)
    assert client.reload().changed == ()
    with pytest.raises(NotAllowed):
        client.status(admin_url=running.admin_url, token="wrong")
    with pytest.raises(ServerNotFound, match="no server of yours is running on port 1"):
        client.status(port=1)
    with pytest.raises(ServerNotFound, match=r"no answer from http://127\.0\.0\.1:9"):
        client.status(admin_url="http://127.0.0.1:9", token="x")


def test_a_proxy_that_the_environment_names_is_not_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert client.status(port=server.port).pid == server.process.pid


def test_the_file_by_which_a_server_is_found_goes_with_it(tmp_path: Path, runtime: Path) -> None:
    bundle = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    with serving(bundle.path, workers=1) as server:
        assert [path.name for path in (runtime / "parbake").iterdir()] == [f"{server.port}.json"]
        assert server.stop() == 0
        assert not list((runtime / "parbake").iterdir())
    with serving(bundle.path, workers=1) as server:
        server.process.kill()
        server.process.wait()
        wait_for(lambda: server.process.poll() is not None)
        with pytest.raises(ServerNotFound):
            statefile.find(server.port)


def test_a_slow_client_of_the_admin_api_keeps_nobody_out(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    with serving(bundle.path, workers=1, request_timeout_s=0.5) as server:
        port = int(statefile.find(server.port).admin_url.rpartition(":")[2])
        with connected(port) as slow:
            slow.send(request("/admin/reload", b"{}")[:-1])
            assert client.status(port=server.port).generation == 1
            assert slow.reply().status == 408
