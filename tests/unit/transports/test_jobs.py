"""Requests for predictions become jobs where jobs are taken, and nowhere else."""

from __future__ import annotations

import asyncio

import pytest

from parbake.app.front import Front
from parbake.errors import InvalidInput
from parbake.settings import ServerSettings
from parbake.transports.access import Access
from parbake.transports.http.jobs import JobPages
from parbake.transports.http.protocol import Exchange, Head
from parbake.transports.http.router import Router


def asked(path: bytes, **headers: bytes) -> Exchange:
    exchange = Exchange()
    exchange.head = Head()
    exchange.head.headers = {name.encode().replace(b"_", b"-"): value for name, value in headers.items()}
    exchange.head.finish(path, b"POST", True)
    return exchange


def test_where_jobs_are_off_a_request_is_answered_as_if_nothing_were_preferred() -> None:
    async def run() -> None:
        front = Front(asyncio.get_running_loop(), lambda: None)
        router = Router(front, ServerSettings(), Access("off", "", False))
        pages = JobPages(front, router.answer)
        exchange = asked(b"/predict/eta", prefer=b"respond-async")
        assert exchange.head.later
        assert not front.jobs.on
        handled: list[Exchange] = []
        handlers = {b"/predict/eta": handled.append}
        assert not pages.take(exchange, ["predict", "eta"], handlers)
        router._exact = dict(handlers)
        router.answer(exchange)
        assert handled == [exchange]

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [b"soon", b"-1", b"1.5", b"9" * 10, b""])
def test_a_time_to_wait_is_whole_seconds(seconds: bytes) -> None:
    async def run() -> None:
        front = Front(asyncio.get_running_loop(), lambda: None)
        pages = JobPages(front, lambda exchange: None)
        exchange = asked(b"/v2/jobs/x?wait=" + seconds)
        exchange.head.method = b"GET"
        with pytest.raises(InvalidInput, match="expected whole seconds"):
            pages.page(exchange, "x", "")

    asyncio.run(run())
