"""The chaos suite's callers of jobs: they notice a job that is lost, answered wrongly, twice, or by another one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from chaos.jobs import Posted, begun_again, fetch, posting, send_again
from chaos.load import SILENT


class Handler(BaseHTTPRequestHandler):
    """Takes jobs, and does to the third one what the model's name says."""

    protocol_version = "HTTP/1.1"
    # Head and body in one packet: the second would wait for an acknowledgement of the first.
    wbufsize = 65_536
    keys: dict[str, str]
    rows: dict[str, list[float]]

    def do_POST(self) -> None:
        row = json.loads(self.rfile.read(int(self.headers["content-length"])))["inputs"][0]["data"]
        key, known = self.headers["idempotency-key"], self.keys
        if self.path.split("/")[3] == "forgets" and row[0] == 3.0 and key in known:
            key += "again"
        elif self.path.split("/")[3] == "refuses" and row[0] == 3.0:
            self.reply(409, {"error": "no", "code": "conflict"})
            return
        if self.path.split("/")[3] == "garbles":
            self.reply(202, {})
            return
        job = known.setdefault(key, f"{self.path.split('/')[3]}-{row[0]:g}")
        if key.endswith("again"):
            job += "x"
        self.rows[job] = row
        self.reply(202, {"id": job, "ahead": 2})

    def do_GET(self) -> None:
        job = self.path.partition("?")[0].split("/")[3]
        name, _, number = job.partition("-")
        value = 2 * self.rows[job][0]
        if number == "3" and name == "loses":
            self.reply(404, {"error": "no such job", "code": "job_not_found"})
        elif number == "3" and name == "waits" and self.path.partition("?")[0].endswith("result"):
            self.reply(202, {"id": job})
        elif self.path.partition("?")[0].endswith("result"):
            stamp = time.monotonic() if number == "3" and name == "changes" else 1.0
            data = [value + (number == "3" and name == "lies"), stamp]
            self.reply(200, {"outputs": [{"name": "y", "data": data}]})
        else:
            self.reply(200, {"id": job, "attempts": 2 if number == "3" else 1})

    def reply(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name that it has
        """Say nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    Handler.keys, Handler.rows = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def post(port: int, model: str) -> Posted:
    """Jobs, until there are five of which the early answers that there are have been fetched."""
    with posting(port, model, callers=1) as posted:
        ends = time.monotonic() + 20
        while len(posted.acknowledged) < 5 or sum(bool(job.early) for job in posted.sent) < 5:
            assert time.monotonic() < ends
            time.sleep(0.01)
    return posted


def test_callers_find_that_every_job_is_answered_once_and_rightly(port: int) -> None:
    posted = post(port, "good")
    heard, changed = fetch(posted)
    assert (len(heard.good), len(heard.failed), heard.wrong, changed) == (len(posted.sent), 0, 0, 0)
    assert send_again(posted) == 0
    assert begun_again(posted) == 1
    assert not posted.refused


@pytest.mark.parametrize(
    ("model", "reasons", "wrong", "changed", "others", "refused"),
    [
        ("loses", {"404 job_not_found": 1}, 0, 0, 0, 0),
        ("waits", {"no answer": 1}, 0, 0, 0, 0),
        ("lies", {}, 1, 0, 0, 0),
        ("changes", {}, 0, 1, 0, 0),
        ("forgets", {}, 0, 0, 1, 0),
        ("refuses", {}, 0, 0, 0, 1),
    ],
)
def test_callers_notice_what_one_job_in_many_came_to(
    port: int, model: str, reasons: dict[str, int], wrong: int, changed: int, others: int, refused: int
) -> None:
    posted = post(port, model)
    heard, differ = fetch(posted, patience_s=0.1)
    assert heard.reasons() == reasons
    assert (heard.wrong, differ, send_again(posted), len(posted.refused)) == (wrong, changed, others, refused)
    assert len(heard.noted) == len(posted.acknowledged) == len(posted.sent) - refused
    assert all(noted.status != SILENT for noted in heard.good)
    assert ("answered" in heard.complaint) == bool(wrong)


def crash(port: int) -> None:
    with posting(port, "garbles", callers=1) as posted:
        while not posted.errors:
            time.sleep(0.01)


def test_a_caller_that_ends_before_its_time_is_no_silence(port: int) -> None:
    with pytest.raises(ExceptionGroup) as told:
        crash(port)
    assert isinstance(told.value.exceptions[0], KeyError)
