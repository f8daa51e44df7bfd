"""The line between supervisor and fronts: calls with replies, both ways, whatever the other end does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from parbake.app.control import (
    AllCounts,
    Channel,
    Commit,
    Done,
    GetCounts,
    Handler,
    Load,
    Message,
    Ping,
    Prepare,
    Text,
    Unload,
    VersionCounts,
    ask_one,
)
from parbake.app.plan import Plan, PlanEntry
from parbake.errors import BundleTorn, ModelNotFound, NotReady, ParbakeError
from parbake.serving.stats import no_counts


async def done(message: Message) -> Message:
    return Done()


@asynccontextmanager
async def line(left: Handler = done, right: Handler = done) -> AsyncIterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    one, two = await Channel.open(ours, left), await Channel.open(theirs, right)
    try:
        yield one, two
    finally:
        one.close()
        two.close()
        await one.closed.wait()
        await two.closed.wait()


PATIENCE_S = 20


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


def test_replies_find_their_calls_in_whatever_order_they_come() -> None:
    async def slow(message: Message) -> Message:
        assert isinstance(message, Load)
        await asyncio.sleep(0.05 if message.name == "slow" else 0)
        return Text(message.name)

    async def test() -> None:
        async with line(right=slow) as (ours, _):
            order: list[str] = []

            async def call(name: str) -> None:
                reply = await ours.call(Load(name))
                assert reply == Text(name)
                order.append(name)

            await asyncio.gather(call("slow"), call("quick"), call("quick"))
            assert order == ["quick", "quick", "slow"]

    run(test)


def test_who_may_be_at_work_on_a_change_is_not_gone_past_and_who_is_asked_to_look_is() -> None:
    asked: list[str] = []
    ends: list[Channel] = []

    async def dies(message: Message) -> Message:
        asked.append("dies")
        ends.pop().close()
        return Done()

    async def answers(message: Message) -> Message:
        asked.append("answers")
        return Text("here")

    async def hangs(message: Message) -> Message:
        await asyncio.sleep(PATIENCE_S)
        return Done()

    async def ask(channels: list[Channel], message: Message, *, changes: bool) -> Message | None:
        return await ask_one(channels, message, PATIENCE_S, changes=changes)

    async def test() -> None:
        async with (
            line(right=dies) as (one, its),
            line(right=dies) as (two, hers),
            line(right=answers) as (ok, _),
        ):
            ends.extend((hers, its))
            assert await ask([one, two, ok], Ping(), changes=False) == Text("here")
            assert asked == ["dies", "dies", "answers"]
            # Nothing is sent to who is known to be gone.
            assert await ask([one, two, ok], Load("eta"), changes=True) == Text("here")
            assert await ask([one, two], Load("eta"), changes=True) is None
            assert asked[3:] == ["answers"]
        async with line(right=dies) as (one, its), line(right=answers) as (ok, _):
            ends.append(its)
            with pytest.raises(NotReady, match=r"has ended: what was asked may have happened all the same"):
                await ask([one, ok], Load("eta"), changes=True)
            assert asked[4:] == ["dies"]
        async with line(right=hangs) as (one, _):
            with pytest.raises(NotReady, match=r"no reply to Load .* may have happened"):
                await ask_one([one], Load("eta"), 0.01, changes=True)

    run(test)


def test_both_ends_may_call_while_a_call_is_answered() -> None:
    async def test() -> None:
        ends: list[Channel] = []

        async def asks_back(message: Message) -> Message:
            return await ends[1].call(Ping()) if isinstance(message, Load) else Done()

        async def pong(message: Message) -> Message:
            return Text("pong")

        async with line(pong, asks_back) as (ours, theirs):
            ends += [ours, theirs]
            assert await ours.call(Load("x")) == Text("pong")

    run(test)


def test_whole_plans_and_counts_go_through() -> None:
    plan = Plan(
        7,
        tuple(
            PlanEntry(
                f"m{i}", "1", "b" * 1000, "sha256:0", "dynamic", "inline", 10.0, 1, 2, 0.0, sockets=("a", "b")
            )
            for i in range(2000)
        ),
        ("gone",),
    )
    counts = AllCounts((VersionCounts("eta", "1", no_counts()),), 3, {"too_large": 2})
    seen: list[Message] = []

    async def keeps(message: Message) -> Message:
        seen.append(message)
        return counts

    async def test() -> None:
        async with line(right=keeps) as (ours, _):
            assert await ours.call(Prepare(plan)) == counts

    run(test)
    assert seen == [Prepare(plan)]


@pytest.mark.parametrize(
    "error", [ModelNotFound("no 'x'", hint="there is y"), BundleTorn("torn", path="$.a"), NotReady("later")]
)
def test_an_error_arrives_as_what_it_is(error: ParbakeError) -> None:
    async def fails(message: Message) -> Message:
        raise error

    async def test() -> None:
        async with line(right=fails) as (ours, _):
            with pytest.raises(type(error)) as caught:
                await ours.call(Ping())
            assert (caught.value.message, caught.value.hint, caught.value.path) == (
                error.message,
                error.hint,
                error.path,
            )
            # The line goes on.
            with pytest.raises(type(error)):
                await ours.call(Ping())

    run(test)


def test_a_bug_on_the_other_end_is_an_error_here_and_a_traceback_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def fails(message: Message) -> Message:
        raise ZeroDivisionError("a bug")

    async def test() -> None:
        async with line(right=fails) as (ours, _):
            with pytest.raises(ParbakeError, match="ZeroDivisionError: a bug"):
                await ours.call(Ping())

    run(test)
    assert "control.failed" in capsys.readouterr().err


def test_a_call_does_not_wait_for_longer_than_it_wants() -> None:
    async def never(message: Message) -> Message:
        await asyncio.sleep(60)
        return Done()

    async def test() -> None:
        async with line(right=never) as (ours, theirs):
            with pytest.raises(NotReady, match=r"no reply to GetCounts within 0.05 s"):
                await ours.call(GetCounts(), 0.05)
            for task in list(theirs._tasks):
                task.cancel()

    run(test)


def test_when_the_other_end_goes_every_waiting_call_is_told() -> None:
    async def never(message: Message) -> Message:
        await asyncio.sleep(60)
        return Done()

    async def test() -> None:
        async with line(right=never) as (ours, theirs):
            waiting: list[Awaitable[Message]] = [asyncio.ensure_future(ours.call(Ping())) for _ in range(3)]
            await asyncio.sleep(0.01)
            for task in list(theirs._tasks)[1:]:
                task.cancel()
            theirs.close()
            for call in waiting:
                with pytest.raises(NotReady, match="the other process has ended"):
                    await call
            with pytest.raises(NotReady, match="the other process has ended"):
                await ours.call(Ping())
            ours.tell(Unload("x"))
            assert ours.closed.is_set()

    run(test)


def test_a_call_without_a_reply_waits_for_nothing() -> None:
    seen = asyncio.Event()

    async def notes(message: Message) -> Message:
        assert message == Commit(3)
        seen.set()
        return Done()

    async def test() -> None:
        async with line(right=notes) as (ours, _):
            ours.tell(Commit(3))
            await seen.wait()

    run(test)
