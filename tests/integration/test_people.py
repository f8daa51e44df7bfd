"""A real server as people meet it: rows by column name, the document, the page."""

from __future__ import annotations

import gzip
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from parbake.contract.model import Key, TensorSpec
from parbake.testing import Server, serving
from tests.conftest import Parbake
from tests.echo import write_echo

FLOWER = [TensorSpec("x", "FP32", (2,), columns=("petal length", "width"), unit="cm")]
ROW = {"petal length": 1.4, "width": 0.25}
ANSWER = {"x_out": {"petal length": 1.399999976158142, "width": 0.25}}

SETTINGS = """
[[deployments]]
bundle = "flower.bundle"
version = "1"
[[deployments]]
bundle = "flower.bundle"
version = "2"
[[deployments]]
name = "baked"
bundle = "store.bundle"
mode = "static"
table = "store.table"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("people")
    write_echo(folder, "flower", FLOWER)
    (folder / "parbake.toml").write_text(SETTINGS.partition("[[deployments]]\nname")[0])
    with serving(config=folder / "parbake.toml") as running:
        yield running


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, json.load(reply), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


def test_a_row_and_a_list_of_rows_are_answered_in_their_own_form(server: Server) -> None:
    for path in ("/predict/flower", "/predict/flower/versions/1"):
        assert ask(server.url + path, ROW)[:2] == (200, ANSWER)
        assert ask(server.url + path, [ROW, ROW])[:2] == (200, [ANSWER, ANSWER])


def test_a_packed_body_is_read(server: Server) -> None:
    packed = gzip.compress(json.dumps(ROW).encode())
    assert ask(f"{server.url}/predict/flower", packed, {"content-encoding": "gzip"})[:2] == (200, ANSWER)


def test_a_refusal_names_path_and_remedy(server: Server) -> None:
    status, body, _ = ask(f"{server.url}/predict/flower", [ROW, {"petal lenght": 1, "width": 2}])
    assert status == 400
    assert body == {
        "error": '"petal length" is missing; model \'flower\' has no column "petal lenght" at $[1]',
        "code": "invalid_input",
        "path": "$[1]",
        "hint": 'did you mean "petal length" where it says "petal lenght"?',
    }


def test_what_does_not_exist_is_said_to_be_missing(server: Server) -> None:
    for path, code in (
        ("/predict/nobody", "model_not_found"),
        ("/predict/flower/versions/9", "version_not_found"),
        ("/predict/flower/nowhere", "route_not_found"),
    ):
        status, body, _ = ask(server.url + path, ROW)
        assert (status, body["code"]) == (404, code)
    status, body, headers = ask(f"{server.url}/predict/flower")
    assert (status, body["code"], headers["allow"]) == (405, "method_not_allowed", "POST")


def test_a_deadline_that_cannot_be_met_is_refused(server: Server) -> None:
    for value in ("0", "soon", "-5"):
        status, body, _ = ask(f"{server.url}/predict/flower", ROW, {"parbake-deadline-ms": value})
        assert (status, body["code"], body["path"]) == (400, "invalid_input", "parbake-deadline-ms")
    assert ask(f"{server.url}/predict/flower", ROW, {"parbake-deadline-ms": "5000"})[:2] == (200, ANSWER)


def test_people_are_counted_like_everybody(server: Server) -> None:
    def count(code: str) -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as reply:
            page = reply.read().decode()
        found = re.findall(rf'parbake_requests_total{{deployment="flower",{code}.*}} (\S+)', page)
        return sum(map(float, found))

    before = count('outcome="ok"'), count('outcome="error",reason="invalid_input"')
    ask(f"{server.url}/predict/flower", ROW)
    ask(f"{server.url}/predict/flower", {})
    assert count('outcome="ok"') == before[0] + 1
    assert count('outcome="error",reason="invalid_input"') == before[1] + 1


def test_static_mode_takes_the_key_alone(tmp_path: Path, parbake: Parbake) -> None:
    # Given a table of two stores
    write_echo(tmp_path, "flower", FLOWER)
    write_echo(tmp_path, "store", [TensorSpec("store", "INT64", ()), *FLOWER], key=Key(columns=("store",)))
    (tmp_path / "rows.csv").write_text("store,petal length,width\n7,1.5,2.5\n8,0.5,0.25\n")
    done = parbake("bake", "store.bundle", "--input", "rows.csv", "--out", "store.table")
    assert done.returncode == 0, done.stderr
    (tmp_path / "parbake.toml").write_text(SETTINGS)
    # When stores are asked for by their key, and one that was never baked
    with serving(config=tmp_path / "parbake.toml") as server:
        baked = {"store_out": 7, "x_out": {"petal length": 1.5, "width": 2.5}}
        assert ask(f"{server.url}/predict/baked", {"store": 7})[:2] == (200, baked)
        assert ask(f"{server.url}/predict/baked", [{"store": 7}])[:2] == (200, [baked])
        status, body, _ = ask(f"{server.url}/predict/baked", [{"store": 8}, {"store": 9}])
    # Then the unknown one is named with the reason
    assert (status, body["code"]) == (404, "key_not_baked")
    assert body["error"].startswith("row 1 (key ")
    assert "made of store" in body["error"]


def test_the_document_follows_what_is_loaded(server: Server) -> None:
    def predictions() -> list[str]:
        return [path for path in ask(f"{server.url}/openapi.json")[1]["paths"] if path.startswith("/predict")]

    loaded = ["/predict/flower", "/predict/flower/versions/1", "/predict/flower/versions/2"]
    assert sorted(predictions()) == loaded
    assert ask(f"{server.url}/v2/repository/models/flower/unload", {})[0] == 200
    assert predictions() == []
    status, body, headers = ask(f"{server.url}/predict/flower", ROW)
    assert (status, body["code"], headers["retry-after"]) == (503, "not_ready", "5")
    assert ask(f"{server.url}/v2/repository/models/flower/load", {})[0] == 200
    assert sorted(predictions()) == loaded
    assert ask(f"{server.url}/predict/flower", ROW)[:2] == (200, ANSWER)


def test_bodies_of_the_repository_extension_are_checked(server: Server) -> None:
    index = f"{server.url}/v2/repository/index"
    assert len(ask(index, {"ready": True})[1]) == 2
    assert ask(index, {"ready": "yes"})[1]["path"] == "$.ready"
    assert ask(index, {"raedy": True})[0] == 400
    status, body, _ = ask(f"{server.url}/v2/repository/models/flower/load", {"parameters": {"config": "{}"}})
    assert (status, body["path"]) == (400, "$.parameters.config")


# The page ------------------------------------------------------------------------------------------


def test_the_page_is_served_with_a_policy(server: Server) -> None:
    for path in ("/", "/docs"):
        with urllib.request.urlopen(server.url + path) as reply:
            assert reply.headers["content-type"] == "text/html; charset=utf-8"
            assert reply.headers["content-security-policy"].startswith("default-src 'self' 'unsafe-inline'")
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.read() == (files("parbake") / "web" / "page.html").read_bytes()


def test_the_page_needs_nothing_from_elsewhere_and_writes_no_html() -> None:
    page = (files("parbake") / "web" / "page.html").read_text()
    assert re.findall(r"https?://[^\s\"'`%]+", page) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<(script|img|iframe|link)[^>]+src=", page)
    # What would turn a model's name or an answer into markup, and where a policy could not help.
    for danger in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "srcdoc",
    ):
        assert danger not in page
