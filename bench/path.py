"""``python -m bench.path``: what a request costs between two sockets, in this process, without kernel and network.

The real protocol, router, endpoint, batcher and session answer on 64 connections whose transports throw the
replies away. CPU time of the whole process; the least of many rounds counts, as all else is other people's load.
What is done later, of the prediction log and of the learned head, is done in between and timed apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

from bench import models
from parbake.app.front import settle_memory
from parbake.cli.output import emit, emit_table
from parbake.contract.bundle import read_bundle
from parbake.monitoring.log import PredictionLog
from parbake.monitoring.model import LogOptions
from parbake.monitoring.service import Monitor
from parbake.runtime.backends import InlineBackend
from parbake.runtime.batcher import Batcher
from parbake.runtime.session import Session
from parbake.serving.head import Head
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.settings import ServerSettings
from parbake.tables.lmdb import open_table
from parbake.transports.http.protocol import HttpProtocol, Limits, Site
from parbake.transports.http.router import Router

_ROWS: Final = 20_000
WAYS: Final = (
    "dynamic",
    "table hit",
    "hybrid, table hit",
    "hybrid, head hit",
    "log on, table hit",
    "everything on, dynamic",
    "everything on, table hit",
)


class _Loop:
    """An event loop whose turns are taken by hand."""

    def __init__(self) -> None:
        self._soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> SimpleNamespace:
        return SimpleNamespace(cancel=lambda: None)

    def turn(self) -> None:
        """All that was to be called soon."""
        while self._soon:
            callbacks, self._soon = self._soon, []
            for callback in callbacks:
                callback()


class _Transport:
    """Counts the replies, and keeps the last."""

    replies = 0
    last = b""

    def write(self, data: bytes) -> None:
        _Transport.replies += 1
        _Transport.last = data

    def get_extra_info(self, name: str) -> None:
        return None


class Bench:
    """One way of serving, ready to be asked."""

    def __init__(self, packed: models.Packed, way: str, folder: Path, connections: int) -> None:
        bundle = read_bundle(packed.bundle)
        loop = _Loop()
        stats = Stats()
        learned = "head" in way
        modelled = learned or "dynamic" in way
        mode = "hybrid" if "hybrid" in way else "dynamic" if modelled else "static"
        log = None
        if "on, " in way:
            options = LogOptions(inputs="hashed", outputs=True) if "everything" in way else LogOptions()
            log = PredictionLog(folder / way.replace(" ", "-"), options)
        self._monitor = Monitor(log, interval_s=1e6)
        backend = InlineBackend(Session(bundle))
        batcher = Batcher(bundle.contract, [backend], loop, longest_s=1.0, observe=stats.batch)
        self._head: Head | None = None
        if learned:
            self._head = Head(most_rows=len(packed.rows), most_bytes=1 << 30, clock=time.monotonic)
        recorder = self._monitor.recorder("eta", "1", mode, bundle.digest, rows=1 << 20)
        recorder.bytes_limit = 1 << 30
        served = ServedVersion(
            "eta",
            "1",
            bundle.contract,
            bundle.digest,
            mode=cast(Any, mode),
            table=None if modelled else open_table(packed.table),
            batcher=batcher if modelled else None,
            head=self._head,
            deadline_s=30.0,
            stats=stats,
            recorder=recorder,
        )
        front = SimpleNamespace(versions=lambda: [served], routed={}, jobs=SimpleNamespace())
        router = Router(cast(Any, front), ServerSettings(), cast(Any, None))
        site = Site(router.answer, Limits(), cast(asyncio.AbstractEventLoop, loop))
        self._loop = loop
        self._receivers: list[Callable[[bytes], None]] = []
        for _ in range(connections):
            protocol = HttpProtocol(site)
            protocol.connection_made(cast(Any, _Transport()))
            self._receivers.append(protocol.data_received)
        head = (
            "POST /v2/models/eta/infer HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nContent-Type: application/json\r\n"
            "Content-Length: %d\r\n\r\n"
        )
        self._requests = [(head % len(body)).encode() + body for body in packed.bodies]
        self._check(packed)

    def _check(self, packed: models.Packed) -> None:
        if self._head is not None:
            # Held from now on: all rows but those that do not fill a turn.
            self.ask(len(self._requests))
        self.ask(len(self._receivers))
        for i in (0, len(self._requests) - 1):
            self._receivers[0](self._requests[i])
            self._loop.turn()
            got = json.loads(_Transport.last.partition(b"\r\n\r\n")[2])["outputs"][0]["data"]
            if got != packed.answers[i]:
                raise RuntimeError(f"answered {got}, the model {packed.answers[i]}")

    def ask(self, count: int) -> float:
        """CPU seconds for so many requests, one on each connection at a time."""
        requests, receivers, turn = self._requests, self._receivers, self._loop.turn
        at, size = 0, len(self._receivers)
        before = _Transport.replies
        started = time.process_time()
        for _ in range(count // size):
            for receive, request in zip(receivers, requests[at : at + size], strict=True):
                receive(request)
            turn()
            at += size
            if at + size > len(requests):
                at = 0
        seconds = time.process_time() - started
        if _Transport.replies - before != count // size * size:
            raise RuntimeError(f"{_Transport.replies - before} replies to {count} requests")
        return seconds

    def drain(self) -> float:
        """CPU seconds to take out and write what was noted, and for the head to learn of it."""
        started = time.process_time()
        self._monitor.drain()
        if self._head is not None:
            self._head.settle()
        return time.process_time() - started

    def close(self) -> None:
        """Write what is left, and end the background's thread."""
        self._monitor.close()


def main() -> None:
    """Measure each way in turn; print the least."""
    parser = argparse.ArgumentParser(prog="python -m bench.path", description="CPU time of a request.")
    parser.add_argument("ways", nargs="*", default=WAYS, help=f"of: {', '.join(WAYS)}  [default: all]")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--requests", type=int, default=3840, help="in a round; with 16384 and more notes are taken out early"
    )
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rows", type=int, default=_ROWS, help="different ones, sent in turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parbake-path-") as temporary:
        folder = Path(temporary)
        packed = models.logistic_regression(folder / "logistic", options.rows)
        benches = {way: Bench(packed, way, folder, options.connections) for way in options.ways}
        settle_memory()
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in benches}
        for _ in range(options.rounds):
            for way, bench in benches.items():
                found[way].append((bench.ask(options.requests), bench.drain()))
        for bench in benches.values():
            bench.close()
    lines = []
    for way, times in found.items():
        front, back = (min(one[i] for one in times) / options.requests * 1e6 for i in (0, 1))
        lines.append((way, f"{front:.2f}", f"{back:.2f}", f"{front + back:.2f}"))
    numbers = ("answer us", "background us", "together us")
    emit_table(lines, ("way", *numbers), numbers=numbers)
    emit()


if __name__ == "__main__":
    main()
