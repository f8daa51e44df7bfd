"""Overload and abuse against a running server: refused early and by name, while everybody else is served."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from parbake.testing import serving
from tests.functions import write_function, write_scaled
from tests.sockets import Client, chunked, connected, request
from tests.traffic import Noted, answer, calling, infer, once, rows, wait_for

SLOW = "import time\ndef predict(x):\n    time.sleep(0.5)\n    return x * 2\n"
FUNCTION, SCALED = "/v2/models/function/infer", "/v2/models/scaled/infer"


def test_more_than_the_queue_holds_is_refused_and_the_rest_is_answered(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW)
    with serving(bundle.path, workers=1, max_queue_rows=5, max_batch_rows=1, deadline_ms=60_000) as server:
        got: list[Noted] = []
        threads = [
            threading.Thread(target=lambda i=i: got.append(once(server.url, FUNCTION, infer((i, 1)))))
            for i in range(15)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    answered = [noted for noted in got if noted.status == 200]
    refused = [noted for noted in got if noted.status != 200]
    assert len(got) == 15
    # One with the model, five behind it; more where some came after others were done.
    assert len(answered) >= 6
    assert refused
    for noted in refused:
        assert (noted.status, noted.json()["code"]) == (503, "overloaded")
        assert "the limit is 5" in noted.json()["error"]
        assert int(noted.headers["retry-after"]) >= 1


def test_what_cannot_be_answered_in_time_is_refused_before_it_waits(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW)
    with serving(bundle.path, workers=1, max_batch_rows=1) as server:
        # The server learns what a row costs.
        for _ in range(3):
            assert once(server.url, FUNCTION, infer((1, 2))).status == 200
        threads = [
            threading.Thread(target=lambda: once(server.url, FUNCTION, infer((1, 2)))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        noted = once(server.url, FUNCTION, infer((1, 2)), parbake_deadline_ms="700")
        for thread in threads:
            thread.join(60)
    assert (noted.status, noted.json()["code"]) == (503, "overloaded")
    assert "the answer would take about" in noted.json()["error"]


def test_no_work_is_done_for_callers_who_have_gone(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.mkdir()
    source = (
        "import pathlib, time, uuid\n"
        "def predict(x):\n"
        f"    pathlib.Path({str(count)!r}, uuid.uuid4().hex).touch()\n"
        "    time.sleep(0.6)\n"
        "    return x * 2\n"
    )
    bundle = write_function(tmp_path, source)
    with serving(bundle.path, workers=1, max_batch_rows=1, deadline_ms=60_000) as server:
        for i in range(9):
            with connected(server.port) as gone:
                gone.send(request(FUNCTION, infer((i, 1))))
                time.sleep(0.02)
        assert answer(once(server.url, FUNCTION, infer((7, 1)))) == [14.0, 2.0]
        # Some were with the model before it was clear that nobody waits.
        assert len(list(count.iterdir())) <= 6


def test_abuse_of_every_kind_at_once_disturbs_nobody(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with (
        serving(
            bundle.path, workers=1, max_body_bytes=10_000, request_timeout_s=1, idle_timeout_s=5
        ) as server,
        calling(server.url, *[rows("scaled", (1.0, float(i))) for i in range(3)]) as callers,
    ):
        opened: list[socket.socket] = []

        def attack(data: bytes, receive: int = 65_536) -> Client:
            connection = socket.create_connection(("127.0.0.1", server.port), 20)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            opened.append(connection)
            connection.sendall(data)
            return Client(connection)

        slow = [attack(request(SCALED, infer((1, 2)))[:-cut]) for cut in range(1, 60)]
        silent = [attack(b"") for _ in range(30)]
        greedy = [
            attack(request("/openapi.json", b"", method="GET", length=False) * 400, 4096) for _ in range(5)
        ]
        huge = [attack(request(SCALED, b"x" * 500_000)) for _ in range(5)]
        endless = attack(request(SCALED, b"", "transfer-encoding: chunked", length=False))
        noise = [attack(bytes([byte]) * 500) for byte in range(0, 256, 16)]
        endless.send(chunked(*[b"[" * 100] * 50)[:-5])
        for client in huge:
            assert client.reply().status == 413
        for client in [*slow, endless]:
            assert client.reply().status == 408
            assert client.ends()
        for client in noise:
            assert client.reply().status == 400
        for client in silent:
            assert client.ends()
        assert len(greedy) == 5
        for caller in callers:
            caller.wait(20)
        for connection in opened:
            connection.close()
        wait_for(lambda: "parbake_connections 4.0" in once(server.url, "/metrics").body.decode())
        assert "Traceback" not in server.log()
    for caller in callers:
        assert all(answer(noted)[0] == 2.0 for noted in caller.noted)


def test_a_full_house_says_so_and_has_room_again(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, workers=1, max_connections=3) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(3)]
        wait_for(lambda: once(server.url, SCALED, infer((1, 2))).status == 503)
        refused = once(server.url, SCALED, infer((1, 2)))
        assert (refused.status, refused.json()["code"]) == (503, "overloaded")
        for connection in held:
            connection.close()
        wait_for(lambda: once(server.url, SCALED, infer((1, 2))).status == 200)
