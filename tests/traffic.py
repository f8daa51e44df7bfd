"""Callers on kept connections who ask without end, and note what they get."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from parbake.app.bake import bake
from parbake.contract.bundle import StoredBundle
from parbake.testing import Server
from parbake.transports import client

Ask = Callable[[int], tuple[str, bytes]]
"""Path and body of the n-th request of a caller."""

PATIENCE_S: Final = 60.0
"""Longest that a test waits for something that should take a moment: the machine may be busy."""


@dataclass(frozen=True, slots=True)
class Noted:
    """One answer. ``status`` is 0 where the connection broke before there was one."""

    began: float
    ended: float
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Call:
    """One kept connection, opened again whenever it was closed."""

    def __init__(self, url: str, timeout_s: float = 30) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)

    def __call__(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, method: str = ""
    ) -> Noted:
        began = time.monotonic()
        try:
            self._connection.request(
                method or ("GET" if body is None else "POST"), path, body, dict(headers or {})
            )
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return Noted(began, time.monotonic(), 0, repr(error).encode())
        named = {name.lower(): value for name, value in response.getheaders()}
        return Noted(began, time.monotonic(), response.status, content, named)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def once(url: str, path: str, body: bytes | None = None, **headers: str) -> Noted:
    """One request on a connection of its own; ``_`` in the names of headers is ``-``."""
    with Call(url) as call:
        return call(path, body, {name.replace("_", "-"): value for name, value in headers.items()})


class Caller:
    """Asks in a thread of its own, one request after another."""

    def __init__(self, url: str, ask: Ask, pause_s: float) -> None:
        self.noted: list[Noted] = []
        self._call = Call(url)
        self._ask = ask
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            self.noted.append(self._call(*self._ask(number)))
            number += 1
            time.sleep(self._pause_s)
        self._call.close()

    @property
    def failures(self) -> list[Noted]:
        """What was not answered with 200."""
        return [noted for noted in self.noted if noted.status != 200]

    def stop(self) -> None:
        """Ask no more, and wait for the last answer."""
        self._stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def wait(self, count: int = 5) -> None:
        """Wait until so many more answers have come."""
        goal = len(self.noted) + count
        wait_for(lambda: len(self.noted) >= goal)


@contextmanager
def calling(url: str, *asks: Ask, pause_s: float = 0.002) -> Iterator[list[Caller]]:
    """A caller for each of ``asks``, until the block ends."""
    callers = [Caller(url, ask, pause_s) for ask in asks]
    try:
        for caller in callers:
            caller.wait(3)
        yield callers
    finally:
        for caller in callers:
            caller.stop()


def wait_for(condition: Callable[[], object], what: str = "") -> None:
    """Wait until something is so."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"waited {PATIENCE_S:g} s in vain {what}")
        time.sleep(0.01)


def infer(values: Sequence[float], **more: object) -> bytes:
    """A request of one row for input ``x``, or of several."""
    rows = len(values) // 2
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": list(values)}
    return json.dumps({"inputs": [tensor], **more}).encode()


def rows(name: str, *values: Sequence[float]) -> Ask:
    """Asks a model for these rows, over and over."""
    bodies = [infer(row) for row in values]
    return lambda number: (f"/v2/models/{name}/infer", bodies[number % len(bodies)])


def predict(name: str, *bodies: object) -> Ask:
    """Asks a model by column name for these, over and over."""
    encoded = [json.dumps(body).encode() for body in bodies]
    return lambda number: (f"/predict/{name}", encoded[number % len(encoded)])


def answer(noted: Noted) -> list[float]:
    """The first output of an answer that was given."""
    assert noted.status == 200, noted
    values: list[float] = noted.json()["outputs"][0]["data"]
    return values


def bake_rows(
    bundle: StoredBundle, values: Sequence[Sequence[float]], out: Path, *, replace: bool = False
) -> Path:
    """A prediction table of these rows for a model with inputs ``left`` and ``right``."""
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"left": left, "right": right}) + "\n" for left, right in values))
    bake(bundle.path, source, out, workers=1, replace=replace)
    return out


def is_there(pid: int) -> bool:
    """Whether a process runs (one that has ended and was not asked for its status does not)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def busy(url: str, path: str) -> bool:
    """Whether a row that comes now has to wait. The row is a new one: an answer to an old one may be kept."""
    row = (1, time.monotonic() % 1000)
    noted = once(url, path, infer(row), parbake_deadline_ms="100")
    # Who is seen to wait too long is refused at once.
    return noted.status == 504 or (noted.status == 503 and noted.json()["code"] == "overloaded")


def memory_mb(server: Server) -> float:
    """Resident memory that belongs to the server's processes alone, in MB."""
    now = client.status(port=server.port)
    pids = [now.pid, *now.front_pids, *(pid for version in now.versions for pid in version.runner_pids)]
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Dirty:", "Private_Clean:")):
                total += int(line.split()[1])
    return total / 1024
