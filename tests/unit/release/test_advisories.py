"""Vulnerabilities: which versions an advisory affects, what a file may be, and what is known when nobody answers."""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import Library
from parbake.errors import SettingsError
from parbake.release.advisories import Advisories, ask, look_up, read


def advisory(name: str, *events: dict[str, str], number: str = "PYSEC-1", **more: Any) -> dict[str, Any]:
    affected = {
        "package": {"ecosystem": "PyPI", "name": name},
        "ranges": [{"type": "ECOSYSTEM", "events": events}],
    }
    return {"id": number, "affected": [{**affected, **more.pop("affected", {})}], "summary": "x", **more}


def book(folder: Path, *entries: dict[str, Any]) -> Advisories:
    for number, entry in enumerate(entries):
        (folder / f"{number}.json").write_text(json.dumps(entry))
    return read(folder)


@pytest.mark.parametrize(
    ("events", "hit", "missed"),
    [
        (({"introduced": "0"}, {"fixed": "1.5.0"}), ["0.1", "1.4.9", "1.5.0rc1"], ["1.5.0", "2.0"]),
        (({"introduced": "1.2"}, {"last_affected": "1.4"}), ["1.2", "1.4"], ["1.1", "1.4.1"]),
        (({"introduced": "0"},), ["0.1", "99"], []),
        (
            ({"introduced": "2.0"}, {"fixed": "2.3"}, {"introduced": "0"}, {"fixed": "1.8"}),
            ["1.7", "2.0", "2.2"],
            ["1.8", "1.9", "2.3"],
        ),
    ],
)
def test_ranges_are_read_as_the_schema_says(
    tmp_path: Path, events: tuple[dict[str, str], ...], hit: list[str], missed: list[str]
) -> None:
    found = book(tmp_path, advisory("Some_Lib", *events))
    assert [found.of(Library("some-lib", version)) for version in hit] == [("PYSEC-1",)] * len(hit)
    assert [found.of(Library("some.lib", version)) for version in missed] == [()] * len(missed)
    assert found.of(Library("other", hit[0])) == ()


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8, unique=True), st.integers(0, 20), st.randoms())
def test_the_order_in_which_events_are_written_does_not_matter(
    points: list[int], here: int, random: Any
) -> None:
    points = sorted(points)
    kinds = ("introduced", "fixed")
    events = [{kinds[at % 2]: f"{point}.1"} for at, point in enumerate(points)]
    expected = sum(point <= here - 1 for point in points) % 2 == 1
    random.shuffle(events)
    from parbake.release.advisories import _Affected, _affects, _Range

    affected = _Affected(ranges=(_Range("ECOSYSTEM", tuple(events)),))
    assert _affects(affected, f"{here}.0") is expected


def test_named_versions_withdrawn_entries_and_other_ecosystems(tmp_path: Path) -> None:
    named = advisory(
        "a", number="GHSA-1", aliases=["CVE-2026-1"], affected={"versions": ["1.0"], "ranges": []}
    )
    gone = advisory("a", {"introduced": "0"}, number="GHSA-2", withdrawn="2026-01-01T00:00:00Z")
    other = advisory("a", {"introduced": "0"}, number="GHSA-3")
    other["affected"][0]["package"]["ecosystem"] = "npm"
    found = book(tmp_path, named, gone, other)
    assert found.of(Library("a", "1.0")) == ("CVE-2026-1",)
    assert found.of(Library("a", "1.1")) == ()


def test_a_version_that_cannot_be_compared_is_not_taken_for_sound(tmp_path: Path) -> None:
    found = book(tmp_path, advisory("a", {"introduced": "0"}, {"fixed": "2"}))
    assert found.of(Library("a", "our-own-build")) is None


def test_a_zip_is_read_as_a_folder_is(tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PYSEC-1.json", json.dumps(advisory("a", {"introduced": "0"})))
    found = look_up(str(path), [])
    assert found.of(Library("a", "3")) == ("PYSEC-1",)
    assert (found.looked.known, found.looked.source) == (True, str(path))


def test_a_file_that_says_nothing_of_python_is_no_all_clear(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = read(tmp_path / "empty")
    assert found.of(Library("a", "1")) is None
    assert not found.looked.known


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": 3}', b"PK\x03\x04torn", b"[" * 100_000])
def test_what_is_no_advisory_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError):
        read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="advisories cannot be read"):
        read(tmp_path / "nothing.zip")


@pytest.fixture
def service() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A service of OSV's API that knows one vulnerability of ``a`` 1.0, on its second page; and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            results: list[dict[str, Any]] = []
            for query in body["queries"]:
                hit = query["package"]["name"] == "a" and query["version"] == "1.0"
                if hit and "page_token" not in query:
                    results.append({"next_page_token": "2"})
                else:
                    results.append({"vulns": [{"id": "GHSA-x", "modified": "2026"}]} if hit else {})
            reply = json.dumps({"results": results}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_is_asked_once_for_each_version(service: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = service
    found = ask(url, [Library("A", "1.0"), Library("a", "1.0"), Library("b", "2.0")])
    assert found.of(Library("a", "1.0")) == ("GHSA-x",)
    assert found.of(Library("b", "2.0")) == ()
    assert found.of(Library("never-asked", "1")) is None
    assert [len(body["queries"]) for body in asked] == [2, 1]


def test_a_service_that_does_not_answer_leaves_everything_unknown() -> None:
    found = ask("http://127.0.0.1:9", [Library("a", "1.0")])
    assert found.of(Library("a", "1.0")) is None
    assert not found.looked.known
    assert "does not answer" in found.looked.words
