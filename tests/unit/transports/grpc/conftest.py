"""A front that serves gRPC in this process, on a loop in a thread of its own, as the front process does."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
import pytest
import uvloop

from parbake.app.control import (
    AllCounts,
    Channel,
    Commit,
    GetCounts,
    GetStatistics,
    Load,
    Message,
    Prepare,
    Unload,
)
from parbake.app.control import Done as Acknowledged
from parbake.app.front import Front
from parbake.app.plan import Plan, PlanEntry
from parbake.contract.bundle import StoredBundle
from parbake.contract.model import TensorSpec
from parbake.errors import Conflict
from parbake.settings import ServerSettings
from parbake.transports.access import Access
from parbake.transports.grpc.server import serve_grpc
from tests.echo import ONNX_TYPES, write_echo

T = TypeVar("T")


class Supervisor:
    """The other end of a front's channel: counts, and notes what it is asked to change."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.changes: list[Message] = []

    async def handle(self, message: Message) -> Message:
        if isinstance(message, GetStatistics):
            counts = await self._front.handle(GetCounts())
            assert isinstance(counts, AllCounts)
            return counts
        if isinstance(message, Load | Unload):
            if message.name != "echo":
                raise Conflict(f"{message.name!r} is not configured")
            self.changes.append(message)
        return Acknowledged()


class GrpcFront:
    """A front with these bundles, listening for gRPC."""

    def __init__(self, bundles: Sequence[StoredBundle], settings: ServerSettings) -> None:
        self._bundles = bundles
        self._settings = settings
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.problems: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))

    def __enter__(self) -> GrpcFront:
        self._thread.start()
        self.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.stop())
        self.run(self._hang_up())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        assert self.problems == []

    def run(self, work: Awaitable[T]) -> T:
        """Await something on the front's loop."""

        async def wrapped() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(wrapped(), self.loop).result(30)

    async def _start(self) -> None:
        self.front = Front(self.loop, lambda: None)
        ours, theirs = socket.socketpair()
        self.supervisor = Supervisor(self.front)
        self._theirs = await Channel.open(theirs, self.supervisor.handle)
        self.front.channel = await Channel.open(ours, self.front.handle)
        entries = tuple(
            PlanEntry(
                name=bundle.contract.name,
                version="1",
                bundle=str(bundle.path),
                digest=bundle.digest,
                mode="dynamic",
                placement="inline",
                deadline_ms=5000,
                max_queue_rows=64,
                max_batch_rows=0,
                batch_delay_ms=0,
            )
            for bundle in self._bundles
        )
        await self.front.handle(Prepare(Plan(1, entries, unloaded=("resting",))))
        await self.front.handle(Commit(1))
        access = Access(self._settings.repository_api, self._settings.admin_token, loopback_only=True)
        with socket.socket() as held:
            # A port that several servers may share stays free for the next one.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
            self._stop = await serve_grpc(self.front, self._settings, access, port)
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """Drain and end the gRPC server; a second time it does nothing."""
        stop: Callable[[], Awaitable[None]] = self._stop
        await stop()

    async def _hang_up(self) -> None:
        for channel in (self._theirs, self.front.channel):
            assert channel is not None
            channel.close()
            await channel.closed.wait()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcFront]:
    """A front with ``echo``, which has one input ``x`` FP32 [2], and ``mixed``, with one input of each datatype."""
    folder = tmp_path_factory.mktemp("bundles")
    bundles = [
        write_echo(folder, "echo", [TensorSpec("x", "FP32", (2,))]),
        write_echo(folder, "mixed", [TensorSpec(name.lower(), name, (2,)) for name in ONNX_TYPES]),  # type: ignore[arg-type]  # the keys are datatypes
    ]
    with GrpcFront(bundles, ServerSettings(max_body_bytes=1_000_000, admin_token="secret")) as front:
        yield front


@pytest.fixture
def channel(echo: GrpcFront) -> Iterator[grpc.Channel]:
    """A connection to `echo`."""
    with grpc.insecure_channel(echo.address) as opened:
        yield opened
