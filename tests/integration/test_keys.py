"""API keys on a real server: nobody is answered who may not ask, by whatever way and however often it was asked."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parbake.app.keys import add_key, remove_key
from parbake.errors import ServerNotFound, SettingsError
from parbake.testing import Server, serving
from parbake.transports import client, statefile
from parbake.transports.grpc.messages import HEALTH, INFERENCE, message
from tests.functions import write_scaled
from tests.sockets import chunked, connected, request
from tests.traffic import Call, answer, bake_rows, infer, once, wait_for

ROW = (1.0, 2.0)


class Keyed:
    """A server with a file of keys, and the keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "keys.toml"
        self.all = add_key(self.file, "all")
        self.eta = add_key(self.file, "only-eta", ["eta"])
        self.slow = add_key(self.file, "slow", rate_per_s=2)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Keyed:
    return Keyed(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def server(keyed: Keyed) -> Iterator[Server]:
    """eta from a table and other by its model, behind keys."""
    eta = write_scaled(keyed.folder / "eta.bundle", 2, name="eta")
    other = write_scaled(keyed.folder / "other.bundle", 3, name="other")
    table = bake_rows(eta, [ROW], keyed.folder / "eta.table")
    with serving(
        eta.path,
        other.path,
        table=f"eta={table}",
        workers=2,
        grpc=True,
        api_keys=keyed.file,
        environment={"XDG_RUNTIME_DIR": str(keyed.folder)},
    ) as running:
        yield running
        assert "Traceback" not in running.log()


@pytest.fixture
def reloaded(server: Server, keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads the keys again."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(keyed.folder))
    return lambda: client.reload(port=server.port)


def bearer(key: str) -> dict[str, Any]:
    return {"authorization": f"Bearer {key}"}


def refused(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    noted = once(server.url, path, body, **headers)
    return noted.status, noted.json()["code"]


MODELS = ["/v2/models/eta", "/v2/models/eta/config", "/v2/models/eta/stats", "/v2/models/eta/versions/1"]
SERVER = ["/v2", "/v2/models/stats", "/v2/repository/index", "/metrics", "/openapi.json"]


def test_without_a_key_nothing_is_told_but_health(server: Server) -> None:
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/eta/ready",
        "/v2/models/eta/versions/1/ready",
    ):
        assert once(server.url, path).status == 200, path
    for path in ("/", "/docs"):
        assert b"<html" in once(server.url, path).body
    headers: dict[str, Any]
    for headers in ({}, bearer("wrong"), {"x_api_key": "wrong"}, {"authorization": "Basic eDp5"}):
        for path in [*MODELS, *SERVER, "/nowhere", "/v2/models/nobody", "/v2/models/eta/versions/ready"]:
            assert refused(server, path, **headers) == (401, "unauthenticated"), path
        for path in (
            "/v2/models/eta/infer",
            "/v2/models/eta/versions/1/infer",
            "/predict/eta",
            "/predict/nobody",
        ):
            assert refused(server, path, infer(ROW), **headers) == (401, "unauthenticated"), path
    told = once(server.url, "/v2/models/eta/infer", infer(ROW))
    assert told.headers["www-authenticate"].startswith("Bearer")
    assert told.json()["hint"] == "send 'authorization: Bearer KEY', or 'x-api-key: KEY'"


def test_a_key_lets_in_by_either_header(server: Server, keyed: Keyed) -> None:
    headers: dict[str, Any]
    for headers in (bearer(keyed.all), {"x_api_key": keyed.all}, {"authorization": f"bearer {keyed.all}"}):
        assert answer(once(server.url, "/v2/models/eta/infer", infer(ROW), **headers)) == [2.0, 4.0]
        assert answer(once(server.url, "/v2/models/other/infer", infer(ROW), **headers)) == [3.0, 6.0]
        for path in [*MODELS, *SERVER]:
            assert once(server.url, path, **headers).status == 200, path
    assert once(server.url, "/nowhere", **bearer(keyed.all)).status == 404


def test_a_key_for_some_deployments_is_told_of_no_other(server: Server, keyed: Keyed) -> None:
    key = bearer(keyed.eta)
    for path in ("/v2/models/eta/infer", "/v2/models/%65ta/infer", "/v2/models/eta/versions/1/infer"):
        assert answer(once(server.url, path, infer(ROW), **key)) == [2.0, 4.0]
    for path in (
        "/v2/models/other/infer", "/v2/models/%6fther/infer", "/v2/models/other/versions/1/infer", "/predict/other",
        "/predict/%6fther", "/predict/other/versions/1", "/v2/models/nobody/infer", "/v2/models//infer",
        "/v2/models/other", "/v2/models/other/stats", "/v2/models/%73tats",
    ):  # fmt: skip
        assert refused(server, path, infer(ROW), **key) == (403, "not_allowed"), path
    assert refused(server, "/metrics", **key) == (403, "not_allowed")
    for path in ("/v2/models/stats", "/v2/repository/index", "/openapi.json"):
        told = once(server.url, path, **key)
        assert told.status == 200
        assert b"other" not in re.sub(rb'"(description|summary|hint)":"[^"]*"', b"", told.body), path
        assert b"eta" in told.body
        assert b'"other"' in once(server.url, path, **bearer(keyed.all)).body or path == "/openapi.json"


def test_who_asks_for_what_is_not_there_is_not_told_what_is(
    server: Server, keyed: Keyed, reloaded: Any
) -> None:
    key = add_key(keyed.file, "early", ["gone"])
    reloaded()
    for path in ("/v2/models/gone", "/v2/models/gone/infer", "/predict/gone"):
        noted = once(server.url, path, infer(ROW), **bearer(key))
        assert (noted.status, noted.json()["code"]) == (404, "model_not_found")
        assert b"other" not in noted.body
    status, words = call(server, "ModelInfer", grpc_infer("gone"), x_api_key=key)
    assert status == "NOT_FOUND"
    assert b"other" not in words


def test_what_is_answered_from_memory_is_answered_to_nobody_else(server: Server, keyed: Keyed) -> None:
    """The same body again and again, on one connection, with and without a key, until every memo has it."""
    body = infer(ROW)
    path = "/v2/models/eta/infer"
    good = request(path, body, f"authorization: Bearer {keyed.eta}")
    bad = request(path, body, "authorization: Bearer pbk_" + "x" * 43)
    none = request(path, body)
    with connected(server.port) as here:
        for _ in range(50):
            here.send(good)
            assert here.reply().json()["outputs"][0]["data"] == [2.0, 4.0]
        for _ in range(50):
            for data, status in ((none, 401), (good, 200), (bad, 401), (good, 200)):
                assert here.send(data).reply().status == status
        # Several in one piece, in the order of the requests.
        here.send(none, good, bad, good, none)
        assert [here.reply().status for _ in range(5)] == [401, 200, 401, 200, 401]
    with connected(server.port) as here:
        for data, status in ((none, 401), (bad, 401), (good, 200), (none, 401)):
            assert here.send(data).reply().status == status


def test_a_client_is_held_to_its_rate_and_others_do_not_notice(server: Server, keyed: Keyed) -> None:
    body = infer(ROW)
    with Call(server.url) as one, Call(server.url) as two:
        statuses = [
            call("/v2/models/eta/infer", body, bearer(keyed.slow)) for _ in range(10) for call in (one, two)
        ]
        noted = [item for item in statuses if item.status == 429]
        # Both connections, whichever fronts they are with, are one client.
        assert len(noted) >= 15
        assert noted[0].json()["code"] == "rate_limited"
        assert noted[0].headers["retry-after"] == "1"
        assert all(one("/v2/models/eta/infer", body, bearer(keyed.all)).status == 200 for _ in range(50))
        wait_for(lambda: one("/v2/models/eta/infer", body, bearer(keyed.slow)).status == 200)


def test_clients_are_counted_by_name(server: Server, keyed: Keyed) -> None:
    def count(labels: str) -> float:
        page = once(server.url, "/metrics", **bearer(keyed.all)).body.decode()
        found = re.search(re.escape(labels) + r" (\S+)", page)
        return float(found[1]) if found else 0.0

    mine = 'parbake_client_requests_total{client="only-eta"}'
    strangers = 'parbake_requests_total{deployment="",outcome="error",reason="unauthenticated",version=""}'
    before, refused_before = count(mine), count(strangers)
    for _ in range(7):
        assert once(server.url, "/predict/eta", b'{"left": 1, "right": 2}', **bearer(keyed.eta)).status == 200
        assert once(server.url, "/predict/eta", b'{"left": 1, "right": 2}').status == 401
    assert count(mine) - before == 7
    assert count(strangers) - refused_before == 7


def test_keys_that_are_added_and_removed_count_from_the_next_reload(
    server: Server, keyed: Keyed, reloaded: Any
) -> None:
    late = add_key(keyed.file, "late")
    body = infer(ROW)
    with connected(server.port) as standing:
        mine = request("/v2/models/eta/infer", body, f"authorization: Bearer {late}")
        assert standing.send(mine).reply().status == 401
        assert reloaded().changed == ()
        for _ in range(5):
            assert standing.send(mine).reply().status == 200
            assert once(server.url, "/v2/models/eta/infer", body, **bearer(late)).status == 200
        remove_key(keyed.file, "late")
        assert standing.send(mine).reply().status == 200
        reloaded()
        # On the connection that stood, whose head was remembered, and on new ones to any front.
        for _ in range(5):
            assert standing.send(mine).reply().status == 401
            assert once(server.url, "/v2/models/eta/infer", body, **bearer(late)).status == 401
    assert answer(once(server.url, "/v2/models/eta/infer", body, **bearer(keyed.all))) == [2.0, 4.0]


def test_a_file_that_is_not_right_changes_nothing_and_is_told(
    server: Server, keyed: Keyed, reloaded: Any
) -> None:
    before = keyed.file.read_bytes()
    keyed.file.write_bytes(before + b"\n[[keys]]\nname = 'half'\n")
    try:
        with pytest.raises(SettingsError, match="missing required field `sha256`"):
            reloaded()
        assert once(server.url, "/v2/models/eta/infer", infer(ROW), **bearer(keyed.all)).status == 200
        assert once(server.url, "/v2/models/eta/infer", infer(ROW)).status == 401
    finally:
        keyed.file.write_bytes(before)
    reloaded()


def test_a_bundle_with_a_fault_does_not_keep_a_removed_key_alive(
    server: Server, keyed: Keyed, reloaded: Any
) -> None:
    leaving = add_key(keyed.file, "leaving")
    reloaded()
    assert once(server.url, "/v2/models/eta/infer", infer(ROW), **bearer(leaving)).status == 200
    remove_key(keyed.file, "leaving")
    manifest = keyed.folder / "other.bundle" / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(b"{")
    try:
        with pytest.raises(Exception, match="not valid JSON"):
            reloaded()
    finally:
        manifest.write_bytes(content)
    assert once(server.url, "/v2/models/eta/infer", infer(ROW), **bearer(leaving)).status == 401


def test_a_front_that_is_started_again_asks_for_keys_too(server: Server, keyed: Keyed, reloaded: Any) -> None:
    pids = client.status(port=server.port).front_pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(client.status(port=server.port).front_pids) - set(pids)) == 2)
    for _ in range(6):
        assert once(server.url, "/v2/models/eta/infer", infer(ROW)).status == 401
        assert once(server.url, "/v2/models/eta/infer", infer(ROW), **bearer(keyed.eta)).status == 200


def test_a_large_body_is_not_taken_from_a_stranger(server: Server, keyed: Keyed) -> None:
    path = "/v2/models/eta/infer"
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\n".encode()
    with connected(server.port) as here:
        # It is told before it has sent the body, or been told to.
        here.send(head, b"expect: 100-continue\r\ncontent-length: 1000000\r\n\r\n")
        assert here.reply().status == 401
    with connected(server.port) as here:
        here.send(head, b"transfer-encoding: chunked\r\n\r\n")
        assert here.reply().status == 401
    known = f"authorization: Bearer {keyed.all}\r\n".encode()
    with connected(server.port) as here:
        here.send(head, known, b"expect: 100-continue\r\ncontent-length: 1000000\r\n\r\n")
        assert here.reply().status == 100
    with connected(server.port) as here:
        here.send(head, known, b"transfer-encoding: chunked\r\n\r\n", chunked(infer(ROW)))
        assert here.reply().status == 200


def test_who_loads_and_unloads_needs_the_admin_token_and_no_key(
    server: Server, keyed: Keyed, reloaded: Any
) -> None:
    path = "/v2/repository/models/other/load"
    headers: dict[str, Any]
    for headers in ({}, bearer(keyed.all), {"x_api_key": keyed.all}):
        assert refused(server, path, b"", **headers) == (403, "not_allowed")
    assert once(server.url, path, b"", **bearer(statefile.find(server.port).token)).status == 200


def test_the_document_says_that_keys_are_needed(server: Server, keyed: Keyed) -> None:
    document = once(server.url, "/openapi.json", **bearer(keyed.all)).json()
    assert document["security"] == [{"bearer": []}, {"x-api-key": []}]
    paths = document["paths"]
    assert {"401", "403", "429"} <= set(paths["/predict/eta"]["post"]["responses"])
    assert paths["/v2/health/live"]["get"]["security"] == []
    assert "security" not in paths["/metrics"]["get"]


# gRPC ------------------------------------------------------------------------------------------------


def grpc_infer(name: str) -> Any:
    asked = message("ModelInferRequest")(model_name=name)
    tensor = asked.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend(ROW)
    return asked


def call(
    server: Server, rpc: str, asked: Any, service: str = INFERENCE, **metadata: str
) -> tuple[str, bytes]:
    """Status and reply of one RPC."""
    with grpc.insecure_channel(server.grpc) as channel:
        try:
            reply: bytes = channel.unary_unary(f"/{service}/{rpc}")(
                asked.SerializeToString(),
                metadata=[(name.replace("_", "-"), value) for name, value in metadata.items()],
                timeout=20,
            )
        except grpc.RpcError as error:
            return error.code().name, (error.details() or "").encode()
    return "OK", reply


def test_grpc_asks_for_the_same_keys(server: Server, keyed: Keyed) -> None:
    for rpc in ("ServerLive", "ServerReady"):
        assert call(server, rpc, message(f"{rpc}Request")())[0] == "OK"
    assert call(server, "ModelReady", message("ModelReadyRequest")(name="eta"))[0] == "OK"
    assert call(server, "Check", message("grpc.health.v1.HealthCheckRequest")(), HEALTH)[0] == "OK"
    named = {
        "ModelMetadata": {"name": "eta"},
        "ModelConfig": {"name": "eta"},
        "ModelStatistics": {"name": "eta"},
    }
    whole: dict[str, dict[str, str]] = {"ServerMetadata": {}, "RepositoryIndex": {}, "ModelStatistics": {}}
    for calls in (named, whole):
        for rpc, fields in calls.items():
            asked = message(f"{rpc}Request")(**fields)
            assert call(server, rpc, asked)[0] == "UNAUTHENTICATED", rpc
            assert call(server, rpc, asked, x_api_key="wrong")[0] == "UNAUTHENTICATED", rpc
            assert call(server, rpc, asked, authorization=f"Bearer {keyed.eta}")[0] == "OK", rpc
    for rpc in named:
        other = message(f"{rpc}Request")(name="other")
        assert call(server, rpc, other, x_api_key=keyed.eta)[0] == "PERMISSION_DENIED"
    assert call(server, "ModelInfer", grpc_infer("eta"))[0] == "UNAUTHENTICATED"
    assert call(server, "ModelInfer", grpc_infer("eta"), x_api_key=keyed.eta)[0] == "OK"
    assert call(server, "ModelInfer", grpc_infer("other"), x_api_key=keyed.eta)[0] == "PERMISSION_DENIED"
    assert call(server, "ModelInfer", grpc_infer("nobody"), x_api_key=keyed.eta)[0] == "PERMISSION_DENIED"
    assert call(server, "ModelInfer", grpc_infer("other"), x_api_key=keyed.all)[0] == "OK"
    for rpc in ("RepositoryIndex", "ModelStatistics"):
        told = call(server, rpc, message(f"{rpc}Request")(), x_api_key=keyed.eta)[1]
        assert b"eta" in told
        assert b"other" not in told
    load = message("RepositoryModelLoadRequest")(model_name="other")
    assert call(server, "RepositoryModelLoad", load, x_api_key=keyed.all)[0] == "PERMISSION_DENIED"


def test_grpc_keeps_to_the_rate_together_with_http(server: Server, keyed: Keyed) -> None:
    found = [call(server, "ModelInfer", grpc_infer("eta"), x_api_key=keyed.slow)[0] for _ in range(8)]
    assert found.count("RESOURCE_EXHAUSTED") >= 4
    assert once(server.url, "/v2/models/eta/infer", infer(ROW), **bearer(keyed.slow)).status in (200, 429)


def test_each_request_of_a_stream_is_held_against_the_key(
    server: Server, keyed: Keyed, reloaded: Any
) -> None:
    leaving = add_key(keyed.file, "streaming", ["eta"])
    reloaded()
    reply_of = message("ModelStreamInferResponse")
    removed = False

    def asks() -> Iterator[bytes]:
        yield grpc_infer("eta").SerializeToString()
        yield grpc_infer("other").SerializeToString()
        wait_for(lambda: removed)
        yield grpc_infer("eta").SerializeToString()

    with grpc.insecure_channel(server.grpc) as channel:
        stream = channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")
        replies = stream(asks(), metadata=[("x-api-key", leaving)], timeout=30)
        first, second = (reply_of.FromString(next(replies)) for _ in range(2))
        assert first.error_message == ""
        assert second.error_message.startswith("the API key of 'streaming' is not for 'other'")
        remove_key(keyed.file, "streaming")
        reloaded()
        removed = True
        third = reply_of.FromString(next(replies))
        assert third.error_message.startswith("the API key is not known here")


# Start -----------------------------------------------------------------------------------------------


def test_a_server_does_not_start_with_keys_that_are_not_right(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    with (
        pytest.raises(ServerNotFound, match=r"keys\.toml cannot be read"),
        serving(bundle.path, api_keys=tmp_path / "keys.toml"),
    ):
        pass
    open_to_others = tmp_path / "open.toml"
    add_key(open_to_others, "team")
    open_to_others.chmod(0o666)
    with (
        pytest.raises(ServerNotFound, match="can be written by others"),
        serving(bundle.path, api_keys=open_to_others),
    ):
        pass


def test_the_command_makes_lists_and_removes_keys(tmp_path: Path, parbake: Any) -> None:
    made = parbake("keys", "add", "team-a", "--deployments", "eta, other", "--rate", "50")
    assert made.returncode == 0
    assert re.fullmatch(r"pbk_[\w-]{43}\n", made.stdout)
    assert "team-a may ask for eta, other" in made.stderr
    more = json.loads(parbake("keys", "add", "team-b", "--json").stdout)
    assert more["name"] == "team-b"
    listed = parbake("keys", "list")
    assert [line.split("   ")[0].split() for line in listed.stdout.splitlines()] == [
        ["client"],
        ["team-a"],
        ["team-b"],
    ]
    assert "eta, other" in listed.stdout
    assert "50 per s" in listed.stdout
    assert made.stdout.strip() not in (tmp_path / "keys.toml").read_text()
    assert parbake("keys", "add", "team-a").returncode == 1
    assert parbake("keys", "remove", "team-a").returncode == 0
    assert parbake("keys", "remove", "team-a").returncode == 3
    assert [key["name"] for key in json.loads(parbake("keys", "list", "--json").stdout)] == ["team-b"]


def test_keys_in_clear_over_a_network_are_warned_of(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    add_key(tmp_path / "keys.toml", "team")
    with serving(bundle.path, workers=1, host="0.0.0.0", api_keys=tmp_path / "keys.toml") as server:
        assert server.log().count("keys.in_clear") == 1
        # To be on this machine, or to come through something on it, is no key.
        assert once(server.url, "/v2/models/eta/infer", infer(ROW), x_forwarded_for="127.0.0.1").status == 401


SEGMENTS = [
    "v2", "models", "eta", "other", "nobody", "versions", "1", "infer", "stats", "ready", "config", "predict",
    "%6fther", "%65ta", "mod%65ls", "", ".", "..", "health", "live", "repository", "index", "metrics", "docs",
    "openapi.json", "eta%2Fother", "load", "unload", "?", "?x=/v2/health/live", "#", "%00", "%",
]  # fmt: skip
STARTS = [
    "/",
    "/v2/models/",
    "/predict/",
    "/v2/models/other/",
    "/v2/models/eta/",
    "http://a/",
    "//",
    "/v2/health/",
]
OPEN = re.compile(
    r"/(docs)?(\?.*)?|/v2/health/(live|ready)(\?.*)?|/v2/models/[^/]+(/versions/[^/]+)?/ready(\?.*)?"
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(STARTS),
    st.lists(st.sampled_from(SEGMENTS), max_size=5),
    st.sampled_from(["GET", "POST", "HEAD"]),
)
def test_no_way_to_write_a_url_leads_past_the_keys(
    server: Server, keyed: Keyed, start: str, segments: list[str], method: str
) -> None:
    path = start + "/".join(segments)
    body = infer(ROW) if method == "POST" else b""
    with connected(server.port) as here:
        reply = here.send(request(path, body, method=method)).reply(to_head=method == "HEAD")
        if reply.status < 400:
            plain = unquote(path.replace("http://a", "", 1) if path.startswith("http://a") else path)
            assert OPEN.fullmatch(plain), path
        if method == "HEAD":
            return
        reply = here.send(request(path, body, f"x-api-key: {keyed.eta}", method=method)).reply()
    if reply.status < 400 and not path.endswith("/ready"):
        assert b'"other"' not in reply.body, path
        assert b"6.0" not in reply.body or b"<html" in reply.body, path
