"""Callers that ask again and again on kept connections, and note what they got and when."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Got:
    """One reply: status 0 means that the connection failed."""

    at: float
    status: int
    retry_after: str
    body: Any


@dataclass(slots=True)
class Caller:
    """One thread that posts bodies in turn."""

    port: int
    path: str
    bodies: Sequence[Any]
    got: list[Got] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Ask until told to stop."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        number = 0
        while not self.stop.is_set():
            body = json.dumps(self.bodies[number % len(self.bodies)])
            number += 1
            try:
                connection.request("POST", self.path, body, {"content-type": "application/json"})
                reply = connection.getresponse()
                text = reply.read()
                retry = reply.headers.get("retry-after", "")
                self.got.append(Got(time.monotonic(), reply.status, retry, json.loads(text)))
                if reply.will_close:
                    connection.close()
            except (OSError, http.client.HTTPException) as error:
                self.got.append(Got(time.monotonic(), 0, "", repr(error)))
                connection.close()
                time.sleep(0.01)
        connection.close()

    @property
    def failures(self) -> list[Got]:
        """Everything that was not answered with 200."""
        return [got for got in self.got if got.status != 200]


@contextmanager
def calling(*callers: Caller) -> Iterator[None]:
    """Let callers ask while the block runs; each has had an answer when it begins."""
    threads = [threading.Thread(target=caller.run) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        limit = time.monotonic() + 30
        while not all(caller.got for caller in callers) and time.monotonic() < limit:
            time.sleep(0.01)
        yield
    finally:
        for caller in callers:
            caller.stop.set()
        for thread in threads:
            thread.join()
