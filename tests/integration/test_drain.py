"""Stopping: not ready any more, all that was accepted is answered, then the end; a second signal does not wait."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from parbake.contract.model import TensorSpec
from parbake.testing import serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.sockets import connected, request
from tests.traffic import Noted, answer, calling, infer, is_there, once, rows, wait_for

SLOW = "import time\ndef predict(x):\n    time.sleep(1)\n    return x * 2\n"


@pytest.mark.parametrize(("placement", "workers"), [("inline", 1), ("process", 2)])
def test_under_load_every_accepted_request_is_answered(tmp_path: Path, placement: str, workers: int) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    asks = [rows("scaled", (1.0, float(i))) for i in range(6)]
    with (
        serving(bundle.path, placement=placement, workers=workers) as server,
        calling(server.url, *asks, pause_s=0.0005) as callers,
    ):
        assert server.stop() == 0
        ended = time.monotonic()
    for caller in callers:
        refused = [noted for noted in caller.noted if noted.status == 0]
        answered = [noted for noted in caller.noted if noted.status]
        for noted in answered:
            assert answer(noted)[0] == 2.0
        # From the last answer on, and not before, the door is closed.
        assert all(noted.began > answered[-1].began for noted in refused)
        for noted in refused:
            # A connection that was refused, or one that was closed between two requests: nothing had been accepted.
            assert (
                b"refused" in noted.body or b"RemoteDisconnected" in noted.body or b"reset" in noted.body
            ), noted
        disconnected = [noted for noted in refused if b"refused" not in noted.body]
        assert len(disconnected) <= 1
        assert all(noted.ended <= ended + 1 for noted in disconnected)
        assert any(noted.headers.get("connection") == "close" for noted in answered[-2:]) or disconnected


def test_what_is_in_the_model_and_behind_it_is_answered(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW)
    with serving(bundle.path, workers=1, max_batch_rows=1) as server:
        got: list[Noted] = []
        threads = [
            threading.Thread(
                target=lambda i=i: got.append(once(server.url, "/v2/models/function/infer", infer((i, i))))
            )
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        # One is with the model, two wait.
        time.sleep(0.3)
        with connected(server.port) as early, connected(server.port) as half:
            early.send(request("/v2/health/ready", method="GET", length=False))
            assert early.reply().status == 200
            whole = request("/v2/health/live", method="GET", length=False)
            half.send(whole[:-4])
            time.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            # As soon as the front has heard of it: not ready, and said on a connection that was open before.
            limit = time.monotonic() + 2
            while True:
                early.send(request("/v2/health/ready", method="GET", length=False))
                reply = early.reply()
                if reply.status != 200:
                    break
                assert time.monotonic() < limit, "it is being drained, and says that it is ready"
                time.sleep(0.01)
            assert reply.status == 503
            assert "draining" in reply.json()["error"]
            assert reply.headers["connection"] == "close"
            half.send(whole[-4:])
            assert half.reply().status == 200
            # Nobody new is let in, and nobody is left waiting at the door.
            wait_for(lambda: not can_connect(server.port))
            assert server.process.wait(60) == 0
        for thread in threads:
            thread.join(60)
    assert sorted(answer(noted)[0] for noted in got) == [0.0, 2.0, 4.0]


def can_connect(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5):
            return True
    except OSError:
        return False


def test_a_slow_reader_gets_all_of_his_answer(tmp_path: Path) -> None:
    bundle = write_function(
        tmp_path, "def predict(x):\n    return x.repeat(100_000, axis=1)\n",
        outputs=(TensorSpec("y", "FP32", (200_000,)),),
    )  # fmt: skip
    body = infer([1.0, 2.0] * 10, parameters={"binary_data_output": True})
    with serving(bundle.path, workers=1) as server, connected(server.port) as slow:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        slow.send(request("/v2/models/function/infer", body))
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None, "it has not waited for the reader"
        reply = slow.reply()
        assert reply.status == 200
        size = int(reply.headers["inference-header-content-length"])
        assert len(reply.body) - size == 10 * 200_000 * 4
        assert server.process.wait(60) == 0


def test_draining_ends_after_its_time(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW.replace("sleep(1)", "sleep(600)"))
    with serving(bundle.path, workers=1, drain_timeout_s=0.5) as server:
        pids = all_pids(server.port)
        thread = threading.Thread(target=lambda: once(server.url, "/v2/models/function/infer", infer((1, 2))))
        thread.start()
        time.sleep(0.3)
        assert server.stop(timeout_s=60) == 0
        thread.join(60)
        assert not thread.is_alive()
        wait_for(lambda: not any(map(is_there, pids)))
        assert "front.not_drained" in server.log()


def all_pids(port: int) -> list[int]:
    now = client.status(port=port)
    return [*now.front_pids, *(pid for version in now.versions for pid in version.runner_pids)]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, second: signal.Signals, runtime: Path) -> None:
    bundle = write_function(tmp_path, SLOW.replace("sleep(1)", "sleep(600)"))
    with serving(bundle.path, workers=2) as server:
        pids = all_pids(server.port)
        thread = threading.Thread(target=lambda: once(server.url, "/v2/models/function/infer", infer((1, 2))))
        thread.start()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "server.draining" in server.log())
        assert server.stop(second, timeout_s=60) == 130
        thread.join(60)
        wait_for(lambda: not any(map(is_there, pids)))
    assert not list((runtime / "parbake").iterdir())


@contextmanager
def starting(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A server that may never get ready; its log is ``folder / "log"``."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "parbake", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_signal_while_starting_ends_the_start(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, "import time\ntime.sleep(600)\ndef predict(x):\n    return x\n")
    with starting(tmp_path, str(bundle.path), "--placement", "process", "--workers", "2") as process:
        # Two fronts, and the runner that never comes back from loading.
        wait_for(lambda: len(children(process.pid)) >= 3)
        pids = children(process.pid)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""
        wait_for(lambda: not any(map(is_there, pids)))


def test_a_hangup_while_starting_waits_for_the_start(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, "import time\ntime.sleep(2)\ndef predict(x):\n    return x * 2\n")
    with starting(tmp_path, str(bundle.path), "--workers", "1") as process:
        wait_for(lambda: len(children(process.pid)) >= 2)
        time.sleep(0.3)
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        url = process.stdout.readline().rpartition(" ")[2].strip()
        wait_for((tmp_path / "log").read_text)
        assert answer(once(url, "/v2/models/function/infer", infer((1, 2)))) == [2.0, 4.0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
        assert events == ["reloaded", "server.draining"]


def test_a_change_while_stopping_is_refused(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW)
    with serving(bundle.path, workers=1) as server:
        thread = threading.Thread(target=lambda: once(server.url, "/v2/models/function/infer", infer((1, 2))))
        thread.start()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "server.draining" in server.log())
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(60) == 0
        thread.join(60)
        assert "the server is stopping" in server.log()
