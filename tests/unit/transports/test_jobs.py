"""Requests for predictions become jobs where jobs are taken, and nowhere else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from parbake.app.front import Front
from parbake.app.keys import ApiKey
from parbake.errors import InvalidInput
from parbake.queue.model import Reply, Request
from parbake.settings import ServerSettings
from parbake.transports.access import Access
from parbake.transports.http.jobs import JobPages
from parbake.transports.http.protocol import Exchange, Head
from parbake.transports.http.router import Router
from parbake.transports.keys import Gate


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


def test_a_job_is_answered_for_a_key_that_is_good_for_it_now(tmp_path: Path) -> None:
    async def run() -> None:
        front = Front(asyncio.get_running_loop(), lambda: None)
        gate = Gate()
        handled: list[Exchange] = []
        pages = JobPages(front, handled.append, gate)
        replies: list[Reply] = []

        def replay(owner: str) -> None:
            pages.replay(Request("eta", "", "infer", b"", (), b"{}"), owner, replies.append)

        for deployments in ((), ("eta",)):
            gate.use([ApiKey("ann", "0" * 64, deployments)], tmp_path / "rates")
            replay("ann")
        assert [exchange.client for exchange in handled] == ["ann", "ann"]
        assert replies == []
        gate.use([ApiKey("ann", "0" * 64, ("else",))], tmp_path / "rates")
        for owner in ("ann", "bob", ""):
            replay(owner)
        assert [reply.status for reply in replies] == [403, 401, 401]
        assert len(handled) == 2

    asyncio.run(run())


def test_a_job_never_becomes_another_job() -> None:
    async def run() -> None:
        front = Front(asyncio.get_running_loop(), lambda: None)
        handled: list[Exchange] = []
        pages = JobPages(front, handled.append)
        pages.replay(
            Request("eta", "", "infer", b"a=b", ((b"prefer", b"respond-async"),), b"{}"),
            "",
            lambda reply: None,
        )
        (exchange,) = handled
        assert (exchange.head.later, exchange.head.route) == (False, b"/v2/models/eta/infer")

    asyncio.run(run())
