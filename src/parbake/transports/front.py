"""The front process: ``python -m parbake.transports.front CONTROL LISTENER``, two inherited descriptors."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import uvloop

from parbake.app.control import Channel, Commit, Configure, Done, Drain, Message, StopListening, UseKeys
from parbake.app.front import Front
from parbake.errors import NotReady
from parbake.settings import ServerSettings
from parbake.transports.access import Access, is_loopback
from parbake.transports.http.protocol import HttpProtocol, Limits, Site
from parbake.transports.http.router import Router
from parbake.transports.keys import Gate

_TICK_S = 1.0
_IDLE_GRACE_S = 0.3
"""How long a drained front keeps quiet connections open: a request may be on its way."""


class FrontProcess:
    """Ties transports to the front's state, and both to the supervisor."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        self._loop = loop
        self._listener = listener
        self._settings: ServerSettings | None = None
        self._grpc_port: int | None = None
        self._access: Access | None = None
        self._gate: Gate | None = None
        self._router: Router | None = None
        self._site: Site | None = None
        self._servers: list[asyncio.Server] = []
        self._last: socket.socket | None = None
        self._tls: ssl.SSLContext | None = None
        self._connections: set[HttpProtocol] = set()
        self._stop_grpc: Callable[[], Awaitable[None]] | None = None
        self.front = Front(loop, self._changed)
        self.front.connections = lambda: len(self._connections)
        self.ended = asyncio.Event()

    async def handle(self, message: Message) -> Message:
        """Answer one call of the supervisor."""
        if isinstance(message, Configure):
            self._configure(message.settings, message.grpc_port, message.keys)
            self.front.configure(message.settings, message.number, message.queue, message.queue_file)
            if message.at_once:
                await self._listen()
            return Done()
        if isinstance(message, UseKeys):
            self._use_keys(message)
            return Done()
        if isinstance(message, StopListening):
            self._stop_listening()
            return Done()
        if isinstance(message, Drain):
            await self._drain()
            # The reply goes out before the process ends.
            self._loop.call_later(0.05, self.ended.set)
            return Done()
        reply = await self.front.handle(message)
        if isinstance(message, Commit) and not self._servers:
            await self._listen()
        return reply

    def _changed(self) -> None:
        if self._router is not None:
            self._router.rebuild()

    def _use_keys(self, message: UseKeys) -> None:
        if self._gate is not None:
            self._gate.use(message.keys, Path(message.rates))

    def _configure(self, settings: ServerSettings, grpc_port: int | None, keys: UseKeys | None) -> None:
        self._settings = settings
        self._grpc_port = grpc_port
        limits = Limits(
            settings.max_body_bytes,
            settings.max_connections,
            settings.request_timeout_s,
            settings.idle_timeout_s,
            # Some bodies of full size at once, in each front.
            max(4 * settings.max_body_bytes, 256 * 1024 * 1024),
        )
        # Where callers need keys, to be on this machine is none.
        local = is_loopback(settings.host) and keys is None
        access = self._access = Access(settings.repository_api, settings.admin_token, local)
        if keys is not None:
            self._gate = Gate()
            self._use_keys(keys)
            self.front.clients = self._gate.counts
            self.front.discreet = True
        router = self._router = Router(self.front, settings, access, self._gate)
        self._site = Site(
            router.answer if self._gate is None else router.answer_known,
            limits,
            self._loop,
            connections=self._connections,
            refused=self.front.refuse,
            admits=self._gate.holder if self._gate is not None else None,
        )

    async def _listen(self) -> None:
        """Accept connections from now on."""
        settings, site, access = self._settings, self._site, self._access
        if settings is None or site is None or access is None:
            raise NotReady("the front has not been told how to serve")
        self._tls = tls_context(settings)
        # The server closes its socket when it stops; this one is for the connections made until then.
        self._last = self._listener.dup()
        server = await self._loop.create_server(
            lambda: HttpProtocol(site),
            sock=self._listener,
            ssl=self._tls,
            # Nobody counts a connection before its handshake is done.
            ssl_handshake_timeout=settings.request_timeout_s if settings.tls_cert else None,
            backlog=4096,
        )
        self._servers.append(server)
        self._tick(site)
        if self._grpc_port is not None:
            from parbake.transports.grpc.server import serve_grpc

            self._stop_grpc = await serve_grpc(self.front, settings, access, self._grpc_port, self._gate)

    def _tick(self, site: Site) -> None:
        site.check_time()
        self._loop.call_later(_TICK_S, self._tick, site)

    def _stop_listening(self) -> None:
        self.front.draining = True
        if self._site is not None:
            self._site.draining = True
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _take_in_the_last(self) -> None:
        """Accept the connections that the kernel has made already, then have it make no more."""
        last, self._last = self._last, None
        site = self._site
        if last is None or site is None:
            return
        accepted: list[socket.socket] = []
        with suppress(OSError):
            # Until none waits (or another front has closed the door).
            while True:
                accepted.append(last.accept()[0])
        with suppress(OSError):
            last.shutdown(socket.SHUT_RDWR)
        last.close()
        for connection in accepted:
            connection.setblocking(False)
            with suppress(OSError):
                # Some have gone again by now.
                await self._loop.connect_accepted_socket(
                    lambda: HttpProtocol(site), connection, ssl=self._tls
                )

    async def _drain(self) -> None:
        """Not ready any more; answer what was accepted; close."""
        self._stop_listening()
        await self._take_in_the_last()
        # Both ways in are closed at the same time, each as its protocol has it.
        stopping_grpc = asyncio.ensure_future(self._stop_grpc()) if self._stop_grpc is not None else None
        quiet_until = self._loop.time() + _IDLE_GRACE_S
        while self._loop.time() < quiet_until and self._connections:
            await asyncio.sleep(0.01)
        await self.front.drain()
        for connection in list(self._connections):
            connection.stop()
        # An answer has been given when it has left this process, and slow readers take their time.
        while any(connection.busy for connection in self._connections):
            await asyncio.sleep(0.005)
        if stopping_grpc is not None:
            await stopping_grpc
        await self.front.close()


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """The server's TLS context, or None where no certificate is set."""
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    if settings.tls_client_ca:
        context.load_verify_locations(settings.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def run(control: int, listener: int) -> None:
    """Serve until drained, or until the supervisor is gone."""
    loop = asyncio.get_running_loop()
    listening = socket.socket(fileno=listener)
    listening.setblocking(False)
    process = FrontProcess(loop, listening)
    channel = await Channel.open(socket.socket(fileno=control), process.handle)
    process.front.channel = channel
    waits = [asyncio.ensure_future(process.ended.wait()), asyncio.ensure_future(channel.closed.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)


def main() -> None:
    """Entry point of the process."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    # Ctrl-C reaches the whole process group; the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvloop.run(run(int(sys.argv[1]), int(sys.argv[2])))
    # No waiting for threads: everything that was accepted has been answered.
    os._exit(0)


if __name__ == "__main__":
    main()
