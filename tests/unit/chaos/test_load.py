"""The chaos suite's callers note what they really got: they are the ones who decide whether a promise held."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from chaos.bundles import asking
from chaos.load import BROKEN, REFUSED, SILENT, Heard, Stream, calling

ROWS = ((1.0, 2.0), (3.0, 4.0))


class Handler(BaseHTTPRequestHandler):
    """Doubles a row, or does what the model's name says."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        row = json.loads(body)["inputs"][0]["data"]
        name = self.path.split("/")[3]
        if name == "cuts":
            self.close_connection = True
            return
        if name == "hangs":
            time.sleep(1.0)
        if name == "busy":
            self.reply(503, {"error": "later", "code": "overloaded"}, "1")
            return
        factor = 3 if name == "lies" and row[0] == 3.0 else 2
        self.reply(200, {"outputs": [{"name": "y", "data": [factor * value for value in row]}]})

    def reply(self, status: int, content: Any, retry_after: str = "") -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        if retry_after:
            self.send_header("retry-after", retry_after)
        if self.path.endswith("/closes/infer"):
            self.send_header("connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name that it has
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def hear(port: int, *streams: Stream, seconds: float = 0.3) -> dict[str, Heard]:
    with calling(port, *streams) as calls:
        time.sleep(seconds)
    return calls.heard


def test_right_answers_are_told_from_wrong_ones(port: int) -> None:
    heard = hear(port, asking("right", "doubles", ROWS, 2), asking("wrong", "lies", ROWS, 2))
    assert heard["right"].wrong == 0
    assert not heard["right"].failed
    assert len(heard["right"].good) == len(heard["right"].noted) > 5
    wrong = heard["wrong"]
    # Every second row.
    assert abs(wrong.wrong - len(wrong.good)) <= 2
    assert "[3.0, 4.0]" in wrong.complaint
    assert "9.0" in wrong.complaint


def test_each_answer_says_which_of_the_accepted_ones_it_is(port: int) -> None:
    heard = hear(port, asking("either", "lies", ROWS, 2, 3))
    assert heard["either"].wrong == 0
    assert {noted.answer for noted in heard["either"].noted} == {0, 1}


def test_refusals_have_their_code_and_whether_they_say_when_to_come_again(port: int) -> None:
    noted = hear(port, asking("busy", "busy", ROWS, 2))["busy"].noted
    assert noted
    assert {(n.status, n.code, n.retry_after) for n in noted} == {(503, "overloaded", True)}


def test_a_connection_that_breaks_is_noted_and_made_anew(port: int) -> None:
    heard = hear(port, asking("cut", "cuts", ROWS, 2))["cut"]
    assert {noted.status for noted in heard.noted} == {BROKEN}
    assert len(heard.noted) > 3
    assert heard.reasons() == {"connection broken": len(heard.noted)}


def test_an_answer_that_ends_the_connection_is_an_answer(port: int) -> None:
    heard = hear(port, asking("closed", "closes", ROWS, 2))["closed"]
    assert len(heard.good) == len(heard.noted) > 3


def test_who_gets_no_answer_gives_up_after_his_patience(port: int) -> None:
    (heard,) = hear(
        port, asking("patient", "hangs", ROWS, 2, connections=1, patience_s=0.2), seconds=0.1
    ).values()
    assert {noted.status for noted in heard.noted} == {SILENT}
    # Timers of the loop are good to a millisecond or two.
    assert all(noted.ended - noted.began > 0.19 for noted in heard.noted)


def test_nobody_there_is_noted_too(port: int) -> None:
    with calling(port, asking("callers", "doubles", ROWS, 2)) as there:
        pass
    assert there["callers"].noted
    (heard,) = hear(1, asking("callers", "doubles", ROWS, 2)).values()
    assert {noted.status for noted in heard.noted} == {REFUSED}


def test_an_open_loop_asks_as_often_as_it_shall_whatever_the_answers_take(port: int) -> None:
    stream = asking("crowd", "hangs", ROWS, 2, rate=50.0)
    (heard,) = hear(port, stream, seconds=1.5).values()
    # Each takes a second, so that only many at once can be so many.
    begun = [noted.began for noted in heard.noted]
    assert 60 <= len(begun) <= 200
    assert (len(begun) - 1) / (max(begun) - min(begun)) == pytest.approx(50, rel=0.2)
    assert len({noted.connection for noted in heard.noted}) > 20
