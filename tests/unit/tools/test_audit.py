"""The dependency audit: what is pinned is asked for, what is known fails, and silence is said and does not."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tools import audit

LOCK = """\
# made by hand
alpha==1.0 \\
    --hash=sha256:00
Beta_x==2.0.1 ; sys_platform == 'win32' \\
    --hash=sha256:01
    # via alpha==9
"""


@contextmanager
def answering(body: Any, status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """A service that answers everything with this; gives its URL, and what it was asked."""
    asked: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "lock.txt"
    path.write_text(LOCK)
    return path


def test_every_pin_is_asked_for_at_once(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering({"results": [{}, {}]}) as (url, asked):
        assert audit.main(["--url", url, str(lock)]) == 0
    assert capsys.readouterr().out == "known vulnerabilities: none in 2 pinned versions\n"
    assert [(query["package"]["name"], query["version"]) for query in asked[0]["queries"]] == [
        ("alpha", "1.0"),
        ("beta-x", "2.0.1"),
    ]
    assert len(asked) == 1


def test_a_known_vulnerability_fails_by_name(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering({"results": [{}, {"vulns": [{"id": "PYSEC-2"}, {"id": "GHSA-1"}]}]}) as (url, _):
        assert audit.main(["--url", url, str(lock)]) == 1
        assert "error: beta-x 2.0.1 has known vulnerabilities: GHSA-1, PYSEC-2\n" in capsys.readouterr().err
        monkeypatch.setattr(audit, "ACCEPTED", {"GHSA-1": "not used", "PYSEC-2": "the same"})
        assert audit.main(["--url", url, str(lock)]) == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 200),
        (b"{", 200),
        ([], 200),
        ({"results": []}, 200),
        ({"results": [1, 2]}, 200),
        ({}, 500),
        ({}, 429),
    ],
)
def test_an_answer_that_says_nothing_is_unknown(
    lock: Path, body: Any, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(body, status) as (url, _):
        assert audit.main(["--url", url, str(lock)]) == 0
        assert "known vulnerabilities: unknown" in capsys.readouterr().err
        assert audit.main(["--strict", "--url", url, str(lock)]) == 1


def test_nobody_there_is_unknown(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--url", "http://127.0.0.1:1/", str(lock)]) == 0
    assert "unknown" in capsys.readouterr().err


def test_the_lock_files_have_pins() -> None:
    for file in audit.FOLDER.glob("*.txt"):
        assert len(audit.pins([file])) > 10, file
