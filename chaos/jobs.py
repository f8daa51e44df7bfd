"""Callers who do not wait: they send jobs and fetch the answers later, whatever is killed meanwhile.

Every job is for a row of its own, and has an idempotency key, so that a caller who heard nothing can send it again.
Its model answers a row with the double of its first value, and with a number that is never the same again: who
computes a job twice has two answers, and a caller sees which of them was kept.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from chaos.bundles import body
from chaos.load import SILENT, Heard, Noted
from chaos.servers import PATIENCE_S

STAMPED: Final = """
import os, time

def predict(x):
    time.sleep(0.03)
    y = x * 2
    y[x[:, 1] == 7, 1] = int.from_bytes(os.urandom(3), "big")
    return y
"""
"""Source of the model: rows whose second value is 7 get a number by chance for it."""

_STAMP: Final = 7.0
_MOST_AHEAD: Final = 40
"""Unanswered jobs beyond which callers hold back: some there shall be when something is killed."""
_PAUSE_S: Final = 0.01
_SHORT_S: Final = 2.0
"""Patience of those who fetch while something is broken: the front that they are at may be."""
_WAIT_S: Final = 5


@dataclass(slots=True)
class Sent:
    """A job as its caller knows it; nobody else has its row."""

    key: str
    body: bytes
    first: float
    """The right answer's first value."""
    began: float
    id: str = ""
    """"" until it is acknowledged."""
    heard: float = 0.0
    """When it was."""
    ahead: int = 0
    """Unanswered jobs before it then."""
    early: bytes = b""
    """Its answer, where it was fetched while something was being killed."""


@dataclass(slots=True)
class Posted:
    """All jobs that callers sent; those without an id when the block of `posting` has ended never get one."""

    port: int
    path: str
    sent: list[Sent] = field(default_factory=list)
    refused: list[Noted] = field(default_factory=list)
    """Refusals of jobs that were not 503."""
    errors: list[Exception] = field(default_factory=list)
    """What ended a caller before its time."""

    @property
    def acknowledged(self) -> list[Sent]:
        """The jobs for which there was a 202."""
        return [job for job in self.sent if job.id]


@contextmanager
def posting(port: int, model: str, callers: int = 3) -> Iterator[Posted]:
    """Have callers send jobs until the block ends, and others fetch what there is of answers meanwhile."""
    posted = Posted(port, f"/v2/models/{model}/infer")
    stop = threading.Event()
    numbers = itertools.count(1)
    later: deque[Sent] = deque()
    works = [
        partial(_post, posted, numbers, later, stop),
        partial(_fetch_some, posted, later, stop),
    ] * callers
    threads = [threading.Thread(target=_guarded, args=(work, posted.errors)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield posted
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if posted.errors:
        raise ExceptionGroup("callers that ended before their time", posted.errors)


def _guarded(work: Callable[[], None], errors: list[Exception]) -> None:
    try:
        work()
    except Exception as error:
        errors.append(error)


def send_again(posted: Posted) -> int:
    """Send every acknowledged job once more under its key; gives how many were another job then."""
    caller = _Caller(posted.port)
    others = 0
    for job in posted.acknowledged:
        reply = _until(caller, "POST", posted.path, job, time.monotonic() + PATIENCE_S)
        others += reply is None or reply.status != 202 or _id(reply.content) != job.id
    caller.close()
    return others


def fetch(posted: Posted, patience_s: float = PATIENCE_S) -> tuple[Heard, int]:
    """The answers to all acknowledged jobs, and how many were others than when they were fetched before."""
    caller = _Caller(posted.port)
    end = time.monotonic() + patience_s
    noted: list[Noted] = []
    complaint = ""
    changed = 0
    began = min((job.began for job in posted.sent), default=time.monotonic())
    for number, job in enumerate(posted.acknowledged):
        reply = _until(caller, "GET", f"/v2/jobs/{job.id}/result?wait={_WAIT_S}", None, end)
        if reply is None:
            noted.append(Noted(job.began, time.monotonic(), SILENT, "", number))
            continue
        code = "" if reply.status == 200 else _code(reply.content)
        if reply.status == 200 and not _is_right(job, reply.content):
            code = "wrong"
            complaint = complaint or f"wrong: {job.body[:200]!r} was answered {reply.content[:200]!r}"
        changed += bool(job.early) and reply.content != job.early
        noted.append(Noted(job.began, time.monotonic(), reply.status, code, number))
    caller.close()
    return Heard("jobs", tuple(noted), complaint, began, time.monotonic()), changed


def begun_again(posted: Posted) -> int:
    """How many of the jobs were begun more than once."""
    caller = _Caller(posted.port)
    count = 0
    for job in posted.acknowledged:
        reply = _until(caller, "GET", f"/v2/jobs/{job.id}", None, time.monotonic() + PATIENCE_S)
        count += reply is not None and reply.status == 200 and json.loads(reply.content)["attempts"] > 1
    caller.close()
    return count


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    content: bytes


class _Caller:
    """One connection, made anew where it broke."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def ask(self, method: str, path: str, job: Sent | None) -> _Reply | None:
        """The reply; None where there was none."""
        headers = {} if job is None else {"prefer": "respond-async", "idempotency-key": job.key}
        try:
            self._connection.request(method, path, None if job is None else job.body, headers)
            reply = self._connection.getresponse()
            return _Reply(reply.status, reply.read())
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return None

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _until(caller: _Caller, method: str, path: str, job: Sent | None, end: float) -> _Reply | None:
    """What comes of asking until there is an answer that is not "later", once at least; None where there is none."""
    while True:
        late = time.monotonic() >= end
        reply = caller.ask(method, path.partition("?")[0] if late else path, job)
        if reply is not None and reply.status != 503 and (job is not None or reply.status != 202):
            return reply
        if late:
            return None
        if reply is None or reply.status == 503:
            time.sleep(_PAUSE_S)


def _post(posted: Posted, numbers: itertools.count[int], later: deque[Sent], stop: threading.Event) -> None:
    with closing(_Caller(posted.port)) as caller:
        while not stop.is_set():
            # One step of it is not interrupted.
            number = next(numbers)
            began = time.monotonic()
            job = Sent(os.urandom(12).hex(), body((float(number), _STAMP)), 2.0 * number, began)
            posted.sent.append(job)
            reply = _until(caller, "POST", posted.path, job, began + PATIENCE_S)
            if reply is not None and reply.status == 202:
                job.ahead, job.heard = json.loads(reply.content)["ahead"], time.monotonic()
                job.id = _id(reply.content)
                later.append(job)
            elif reply is not None:
                posted.refused.append(Noted(began, time.monotonic(), reply.status, _code(reply.content), 0))
            stop.wait(_PAUSE_S if job.ahead < _MOST_AHEAD else 20 * _PAUSE_S)


def _fetch_some(posted: Posted, later: deque[Sent], stop: threading.Event) -> None:
    """Ask for one after the other; who is not answered yet must not keep the next from being asked for."""
    with closing(_Caller(posted.port, _SHORT_S)) as caller:
        while not stop.is_set():
            try:
                job = later.popleft()
            except IndexError:
                stop.wait(_PAUSE_S)
                continue
            reply = caller.ask("GET", f"/v2/jobs/{job.id}/result?wait=1", None)
            if reply is not None and reply.status == 200:
                job.early = reply.content
                continue
            later.append(job)
            stop.wait(_PAUSE_S)


def _is_right(job: Sent, content: bytes) -> bool:
    try:
        first, _ = json.loads(content)["outputs"][0]["data"]
    except (ValueError, LookupError, TypeError):
        return False
    return bool(first == job.first)


def _id(content: bytes) -> str:
    return str(json.loads(content)["id"])


def _code(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["code"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return ""
