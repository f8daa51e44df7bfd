"""Clients that take their time, clients that only sit there, and too many of them."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from bench.processes import cpu_seconds
from chaos.bundles import TAIL, asking, body, multiplier
from chaos.load import calling
from chaos.model import NotTested, Observed, Scenario, Stage, at_most, held, no_failures, none
from chaos.servers import memory_mb, sockets, status, wait_for
from parbake.testing import Server, serving

_TIMEOUT_S: Final = 3.0
_IDLE: Final = 10_000
_SLOW: Final = 100


def _connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10, (source, 0))


def _request(row: tuple[float, float] = (1.0, 2.0)) -> bytes:
    content = body(row)
    head = (
        f"POST /v2/models/sound/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other end has hung up; what it said before is thrown away."""
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _status(connection: socket.socket) -> int:
    """The status of the reply that comes; 0 where none does."""
    with suppress(OSError, IndexError, ValueError):
        connection.settimeout(10)
        return int(connection.recv(65_536).split(b" ", 2)[1])
    return 0


@contextmanager
def _closing(connections: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def _serve(stage: Stage) -> str:
    stage.say("starting a server")
    return str(multiplier(stage.folder / "sound.bundle", 2, name="sound"))


def _slow(stage: Stage) -> Observed:
    bundle = _serve(stage)
    with (
        serving(bundle, workers=1, request_timeout_s=_TIMEOUT_S, idle_timeout_s=_TIMEOUT_S) as server,
        _closing([]) as connections,
        calling(server.port, asking("callers", "sound", TAIL, 2, connections=4)) as calls,
    ):
        before = sockets(status(server).front_pids[0])
        silent = [_connect(server.port) for _ in range(_SLOW)]
        halves = [_connect(server.port) for _ in range(_SLOW)]
        drops = [_connect(server.port) for _ in range(_SLOW)]
        connections += silent + halves + drops
        request = _request()
        for number, connection in enumerate(halves):
            connection.sendall(request[: 1 + number % (len(request) - 1)])
        began = time.monotonic()
        stage.say("a byte a second")
        turns = 0
        while time.monotonic() - began < _TIMEOUT_S + 2.0:
            for connection in drops:
                with suppress(OSError):
                    connection.sendall(request[turns : turns + 1])
            turns += 1
            time.sleep(1.0)
        told = sum(_status(connection) == 408 for connection in halves)
        left = sum(not _has_ended(connection) for connection in silent + halves + drops)
        (front,) = status(server).front_pids
        given_back_s = wait_for(lambda: sockets(front) <= before, 2 * _TIMEOUT_S)
        time.sleep(max(stage.seconds - _TIMEOUT_S, 0.0))
    heard = calls["callers"]
    checks = [
        no_failures("failed requests of the other callers", heard.failed),
        none("slow clients still connected 2 s after their time was up", left),
        none("half requests that were not told 408", len(halves) - told),
        at_most("until the front has none of their sockets any more", given_back_s * 1e3, 1e3 * _TIMEOUT_S, "ms"),
    ]  # fmt: skip
    return Observed([heard], checks, {"slow clients": len(connections)})


def _allow(wanted: int) -> None:
    """Let this process, and those it starts, open so many files. Raises `NotTested` where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except (ValueError, OSError) as error:
        raise NotTested(f"it needs {wanted:,} open files in a process, the limit is {hard:,}") from error


def _idle(stage: Stage) -> Observed:
    _allow(_IDLE + 1000)
    bundle = _serve(stage)
    with (
        serving(bundle, workers=1, max_connections=_IDLE + 500) as server,
        _closing([]) as connections,
    ):
        (front,) = status(server).front_pids
        with calling(server.port, asking("callers", "sound", TAIL, 2, connections=4)) as calls:
            time.sleep(0.5)
            before = memory_mb([front])
            stage.say(f"opening {_IDLE:,} connections")
            began = time.monotonic()
            # Ports of one address may run short.
            connections += [_connect(server.port, f"127.0.0.{2 + number % 8}") for number in range(_IDLE)]
            opened_s = time.monotonic() - began
            time.sleep(stage.seconds)
            after = memory_mb([front])
            stage.say("asking on some of them")
            asked = connections[:: _IDLE // 200]
            for connection in asked:
                connection.sendall(_request())
            unanswered = sum(_status(connection) != 200 for connection in asked)
            ended = sum(map(_has_ended, connections))
    heard = calls["callers"]
    checks = [
        no_failures("failed requests of the other callers", heard.failed),
        none("idle connections that were cut", ended),
        none("of 200 that asked at last, not answered", unanswered),
    ]
    figures = {
        "connections opened in, s": opened_s,
        "memory of the front for each, kB": (after - before) * 1e3 / _IDLE,
    }
    return Observed([heard], checks, figures)


def _descriptors(stage: Stage) -> Observed:
    bundle = _serve(stage)
    with (
        serving(bundle, workers=1) as server,
        _closing([]) as connections,
    ):
        (front,) = status(server).front_pids
        with calling(server.port, asking("callers", "sound", TAIL, 2, connections=4)) as calls:
            time.sleep(0.3)
            most = _open_files(front) + 20
            _, hard = resource.prlimit(front, resource.RLIMIT_NOFILE)
            resource.prlimit(front, resource.RLIMIT_NOFILE, (most, hard))
            stage.say("opening connections")
            connections += [_connect(server.port) for _ in range(200)]
            busy = cpu_seconds([front])
            began = time.monotonic()
            time.sleep(stage.seconds)
            busy = (cpu_seconds([front]) - busy) / (time.monotonic() - began)
            for connection in connections:
                connection.close()
            stage.say("asking anew")
            fresh_s = wait_for(lambda: _answered(server), 10)
            same = status(server).front_pids == (front,)
    heard = calls["callers"]
    checks = [
        no_failures("failed requests of those who were connected", heard.failed),
        at_most("a new caller is answered once the others have gone, after", fresh_s * 1e3, 1000, "ms"),
        held("the front is the same process", same),
    ]
    return Observed([heard], checks, {"share of a CPU that the front took meanwhile": busy})


def _open_files(pid: int) -> int:
    from pathlib import Path

    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _answered(server: Server) -> bool:
    with _closing([]) as connections, suppress(OSError):
        connections.append(_connect(server.port))
        connections[0].sendall(_request())
        return _status(connections[0]) == 200
    return False


SCENARIOS: Final = (
    Scenario(
        "slow-clients",
        "a hundred clients each that say nothing, send half a request, and send a byte a second",
        "they are cut off when their time is up, with 408 where a request had begun; nobody else notices",
        _slow,
    ),
    Scenario(
        "idle-10000",
        "10,000 connections that say nothing",
        "they cost some memory and nothing else, and are answered when they ask",
        _idle,
    ),
    Scenario(
        "descriptors",
        "a front may open 20 files more, and 200 clients connect",
        "those who are connected notice nothing, and when there is room again new ones are answered",
        _descriptors,
    ),
)
