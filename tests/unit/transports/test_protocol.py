"""HTTP/1.1 over real sockets: in order, within limits, and always ready for the next client."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from parbake.errors import MalformedBody, MethodNotAllowed, ParbakeError, RequestTooLarge
from parbake.transports.http import protocol
from parbake.transports.http.protocol import (
    Exchange,
    HttpProtocol,
    Limits,
    Site,
    allow,
    compress,
    decompress,
)
from tests.sockets import Client, Reply, chunked, connected, request

T = TypeVar("T")


@dataclass
class Running:
    """A site that listens in a thread of its own. Times are looked at every 20 ms."""

    site: Site
    loop: asyncio.AbstractEventLoop
    port: int = 0
    handled: list[str] = field(default_factory=list)
    held: list[Exchange] = field(default_factory=list)
    refused: list[ParbakeError] = field(default_factory=list)

    def do(self, work: Callable[[], T]) -> T:
        """Do something in the thread of the loop."""
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self.loop.call_soon_threadsafe(call)
        return done.result(20)

    def answer(self, exchange: Exchange) -> None:
        """Tell what was asked; ``/later?MS`` after a while, ``/held`` when told, ``/big?BYTES`` at length."""
        path = exchange.path.decode("latin-1")
        self.handled.append(path)
        asked = {
            "method": exchange.method.decode(),
            "path": path,
            "query": exchange.query.decode("latin-1"),
            "body": exchange.body.decode("latin-1"),
        }
        reply = json.dumps(asked).encode()
        if path == "/later":
            self.loop.call_later(int(exchange.query) / 1000, exchange.reply_json, reply)
        elif path == "/held":
            self.held.append(exchange)
        elif path == "/big":
            exchange.reply_json(b'"' + b"x" * (int(exchange.query) - 2) + b'"')
        elif path == "/content":
            try:
                exchange.reply(200, exchange.content(1000), b"text/plain")
            except ParbakeError as error:
                exchange.fail(error)
        else:
            exchange.reply_json(reply)

    def release(self) -> None:
        """Answer what is held, the last first."""
        while self.held:
            exchange = self.held.pop()
            exchange.reply_json(json.dumps({"path": "/held", "body": exchange.body.decode()}).encode())

    def stop_connections(self) -> None:
        """As a front does when it ends."""
        for connection in list(self.site.connections):
            connection.stop()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, in the thread of the loop."""
        until = time.monotonic() + 20
        while not self.do(condition):
            assert time.monotonic() < until, "it never came to be"
            time.sleep(0.01)


@contextmanager
def running(*, tls: ssl.SSLContext | None = None, uv: bool = True, **limits: Any) -> Iterator[Running]:
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop() if uv else asyncio.new_event_loop()
    site = Site(lambda exchange: None, Limits(**limits), loop)
    here = Running(site, loop)
    site.handler = here.answer
    site.refused = here.refused.append
    listener = socket.create_server(("127.0.0.1", 0))
    here.port = listener.getsockname()[1]

    async def main() -> None:
        server = await loop.create_server(lambda: HttpProtocol(site), sock=listener, ssl=tls)
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
            site.check_time()
        server.close()
        for connection in list(site.connections):
            connection.abort()
        await asyncio.sleep(0.02)

    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(20)
    try:
        yield here
    finally:
        stop.set()
        thread.join(20)
        loop.close()


@pytest.fixture(params=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    """On the loop of the fronts, and on that of the admin API."""
    with running(uv=request.param == "uvloop", max_body_bytes=10_000) as here:
        yield here


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with connected(server.port) as here:
        yield here


def answers(server: Running) -> bool:
    """Whether the next client is served."""
    with connected(server.port) as other:
        reply = other.send(request("/next", b"hello")).reply()
    return reply.status == 200 and reply.json()["body"] == "hello"


# What is right -------------------------------------------------------------------------------------


def test_a_kept_connection_answers_one_request_after_another(client: Client) -> None:
    for body in (b"", b"one", b"two" * 1000):
        reply = client.send(request("/a?b=c&d", body)).reply()
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert "connection" not in reply.headers
        assert reply.json() == {"method": "POST", "path": "/a", "query": "b=c&d", "body": body.decode()}


def test_replies_come_in_the_order_of_the_requests_however_they_are_done(client: Client) -> None:
    paths = ["/later?150", "/a", "/later?10", "/b", "/later?80", "/c"]
    client.send(*(request(path, str(i).encode()) for i, path in enumerate(paths)))
    assert [client.reply().json()["body"] for _ in paths] == ["0", "1", "2", "3", "4", "5"]


def test_a_request_in_single_bytes_is_read(client: Client) -> None:
    for _ in range(2):
        # Twice: the second time its head has been seen before.
        for byte in request("/slow", b"abc"):
            client.send(bytes([byte]))
        assert client.reply().json()["body"] == "abc"


def test_chunks_are_put_together(client: Client) -> None:
    head = request("/chunks", b"", "transfer-encoding: chunked", length=False)
    client.send(head, b"3;name=value\r\nabc\r\n", chunked(b"d", b"efg" * 100))
    assert client.reply().json()["body"] == "abcd" + "efg" * 100
    client.send(head, chunked())
    assert client.reply().json()["body"] == ""


def test_a_body_of_very_many_small_chunks_is_put_together(server: Running, client: Client) -> None:
    client.send(request("/chunks", b"", "transfer-encoding: chunked", length=False))
    client.send(chunked(*(b"%02d" % (i % 100) for i in range(4000))))
    assert client.reply().json()["body"] == "".join(f"{i % 100:02d}" for i in range(4000))


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(client: Client) -> None:
    client.send(request("/expect", b"xyz", "expect: 100-continue")[:-3])
    assert client.reply().status == 100
    assert client.send(b"xyz").reply().json()["body"] == "xyz"
    assert client.send(request("/after")).reply().status == 200


def test_a_client_that_asks_with_too_large_a_body_is_told_so_at_once(client: Client) -> None:
    client.send(request("/expect", b"x" * 10_001, "expect: 100-continue")[:-10_001])
    assert client.reply().status == 413


def test_head_is_answered_without_a_body(client: Client) -> None:
    reply = client.send(request("/a", method="HEAD", length=False)).reply(to_head=True)
    assert int(reply.headers["content-length"]) > 0
    assert client.send(request("/b", b"!")).reply().json()["body"] == "!"


@pytest.mark.parametrize(
    "asked",
    [
        request("/a", b"x", version="1.0"),
        request("/a", b"x", "connection: keep-alive", version="1.0"),
        request("/a", b"x", "connection: close"),
        request("/a", b"x", "Connection: foo, Close"),
    ],
)
def test_a_connection_that_shall_not_be_kept_is_closed_after_the_reply(client: Client, asked: bytes) -> None:
    reply = client.send(asked).reply()
    assert reply.json()["body"] == "x"
    assert reply.headers["connection"] == "close"
    assert client.ends()


def test_a_client_that_has_said_all_it_wants_still_gets_every_answer(server: Running, client: Client) -> None:
    client.send(request("/later?100", b"1"), request("/held", b"2"), request("/a", b"3"))
    client.socket.shutdown(socket.SHUT_WR)
    server.wait(lambda: bool(server.held))
    server.do(server.release)
    assert [client.reply().json()["body"] for _ in range(3)] == ["1", "2", "3"]
    assert client.ends()


def test_a_client_that_sends_no_more_and_has_waited_counts_as_gone(
    server: Running, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_HALF_CLOSED_S", 0.1)
    client.send(request("/held", b"1"))
    client.socket.shutdown(socket.SHUT_WR)
    server.wait(lambda: bool(server.held) and server.held[0].closed)
    assert client.ends()
    assert answers(server)


def test_a_proxys_form_of_the_url_is_understood(client: Client) -> None:
    reply = client.send(request("http://localhost:8000/a/b?c")).reply()
    assert (reply.json()["path"], reply.json()["query"]) == ("/a/b", "c")
    assert client.send(request("HTTPS://localhost")).reply().json()["path"] == "/"


@pytest.mark.parametrize("body", [b"", b"abc"])
def test_an_offer_to_upgrade_is_passed_over(client: Client, body: bytes) -> None:
    # What a client of Java sends by default.
    offer = (
        "connection: Upgrade, HTTP2-Settings",
        "upgrade: h2c",
        "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA",
    )
    client.send(request("/a", body, *offer), request("/b", b"!"))
    assert client.reply().json() == {"method": "POST", "path": "/a", "query": "", "body": body.decode()}
    assert client.reply().json()["body"] == "!"
    client.send(request("/c", b"", *offer, "transfer-encoding: chunked", length=False), chunked(b"de", b"f"))
    assert client.reply().json()["body"] == "def"
    client.send(request("/d", b"", *offer, method="GET", length=False) * 3)
    assert [client.reply().json()["path"] for _ in range(3)] == ["/d"] * 3


def test_hundreds_of_requests_in_one_piece_are_all_answered_in_order(server: Running, client: Client) -> None:
    client.send(request("/later?20", b"first"), *(request("/a", b"%d" % i) for i in range(700)))
    assert client.reply().json()["body"] == "first"
    assert [client.reply().json()["body"] for _ in range(700)] == [str(i) for i in range(700)]


def test_while_answers_are_due_only_so_many_requests_are_taken(server: Running, client: Client) -> None:
    client.send(*(request("/held", b"%d" % i) for i in range(500)))
    server.wait(lambda: len(server.held) >= protocol._MAX_PIPELINED)
    time.sleep(0.1)
    assert len(server.handled) <= protocol._MAX_PIPELINED + 1
    got: list[str] = []
    while len(got) < 500:
        server.do(server.release)
        got.append(client.reply().json()["body"])
    assert got == [str(i) for i in range(500)]


# Limits --------------------------------------------------------------------------------------------


def refusal(client: Client, status: int) -> Any:
    """The refusal that the client can read, after which the connection ends."""
    reply = client.reply()
    assert reply.status == status
    assert reply.headers["connection"] == "close"
    body = reply.json()
    assert "Traceback" not in reply.body.decode()
    assert client.ends()
    return body


@pytest.mark.parametrize("size", [10_001, 5_000_000])
def test_a_body_over_the_limit_is_refused_and_the_client_can_read_it(
    server: Running, client: Client, size: int
) -> None:
    # It sends everything before it reads, as most clients do.
    client.send(request("/a", b"x" * size))
    body = refusal(client, 413)
    assert body["code"] == "too_large"
    assert f"at least {size} bytes, the limit is 10000" in body["error"]
    assert "max_body_bytes" in body["hint"]
    assert not server.handled
    assert [error.code for error in server.refused] == ["too_large"]
    assert answers(server)


def test_a_chunked_body_over_the_limit_is_refused_and_the_client_can_read_it(
    server: Running, client: Client
) -> None:
    client.send(request("/a", b"", "transfer-encoding: chunked", length=False))
    client.send(chunked(*(b"x" * 1000 for _ in range(5000))))
    assert "the limit is 10000" in refusal(client, 413)["error"]
    assert not server.handled
    assert answers(server)


def test_a_body_of_exactly_the_limit_is_taken(client: Client) -> None:
    assert len(client.send(request("/a", b"x" * 10_000)).reply().json()["body"]) == 10_000


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(101)) + b"\r\n",
        b"GET / HTTP/1.1\r\n" + (b"x: " + b"y" * 1000 + b"\r\n") * 40 + b"\r\n",
    ],
    ids=["url", "value", "repeated headers", "many headers", "many bytes"],
)
@pytest.mark.parametrize("pieces", [1, 50])
def test_a_head_over_the_limits_is_refused(server: Running, client: Client, head: bytes, pieces: int) -> None:
    size = len(head) // pieces + 1
    for at in range(0, len(head), size):
        try:
            client.send(head[at : at + size])
        except ConnectionError:
            break
        if pieces > 1:
            time.sleep(0.001)
    assert refusal(client, 431)["code"] == "too_large"
    assert not server.handled
    assert answers(server)


def test_a_head_that_never_ends_is_not_kept(server: Running, client: Client) -> None:
    client.send(b"GET / HTTP/1.1\r\nx: ")
    with suppress(ConnectionError):
        for _ in range(2000):
            client.send(b"y" * 65_536)
    assert [error.code for error in server.refused] == ["too_large"]
    assert answers(server)


def test_a_trailer_that_never_ends_is_not_kept(server: Running, client: Client) -> None:
    client.send(request("/a", b"", "transfer-encoding: chunked", length=False), b"1\r\na\r\n0\r\nx: ")
    for _ in range(40):
        time.sleep(0.001)
        client.send(b"y" * 5000)
    assert refusal(client, 431)["code"] == "too_large"
    assert not server.handled


def test_long_chunks_whose_size_comes_alone_are_no_long_trailer(server: Running) -> None:
    with running(max_body_bytes=10**7) as large, connected(large.port) as client:
        client.send(request("/a", b"", "transfer-encoding: chunked", length=False))
        for _ in range(3):
            time.sleep(0.05)
            client.send(b"%x\r\n" % 200_000)
            time.sleep(0.05)
            client.send(b"x" * 200_000, b"\r\n")
        client.send(b"0\r\n\r\n")
        assert len(client.reply().json()["body"]) == 600_000


def test_more_connections_than_the_limit_are_told_so(server: Running) -> None:
    with running(max_connections=2) as here:
        with connected(here.port) as one, connected(here.port) as two:
            assert one.send(request("/a")).reply().status == 200
            assert two.send(request("/a")).reply().status == 200
            with connected(here.port) as three:
                three.send(request("/a", b"x" * 1000))
                body = refusal(three, 503)
                assert body["error"] == "2 connections are open, and that is the limit"
            assert one.send(request("/b")).reply().status == 200
        here.wait(lambda: not here.site.connections)
        assert answers(here)


# Encodings -----------------------------------------------------------------------------------------


def deflated(data: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, wbits)
    return packer.compress(data) + packer.flush()


@given(st.binary(max_size=300))
def test_encodings_are_undone(data: bytes) -> None:
    for encoding, packed in [
        (b"gzip", gzip.compress(data, mtime=0)),
        (b"x-gzip", gzip.compress(data, mtime=0)),
        (b"deflate", zlib.compress(data)),
        (b"deflate", deflated(data, -15)),
    ]:
        assert decompress(packed, encoding, 300) == data


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_small_body_unpacks_to_no_multitude_of_it(pack: Callable[[bytes], bytes]) -> None:
    encoding = b"gzip" if pack is gzip.compress else b"deflate"
    limit = 1 << 30
    most = 1024 * 1024
    assert len(decompress(pack(bytes(most)), encoding, limit)) == most
    bomb = pack(bytes(most + 1))
    with pytest.raises(RequestTooLarge, match=f"more than 200 times its {len(bomb)} bytes") as caught:
        decompress(bomb, encoding, limit)
    assert caught.value.hint == "send it without content-encoding"
    # What is text and numbers is far from that, and the limit on bodies stays.
    text = b",".join(b"%d" % (number * 7919 % 100_003) for number in range(400_000))
    assert decompress(pack(text), encoding, limit) == text
    with pytest.raises(RequestTooLarge, match="more than 1000 bytes"):
        decompress(pack(text), encoding, 1000)


@given(st.binary(max_size=60), st.sampled_from([b"gzip", b"deflate"]))
def test_any_bytes_unpack_or_are_refused(data: bytes, encoding: bytes) -> None:
    for attempt in (
        data,
        gzip.compress(b"x" * 50, mtime=0)[: len(data)] + data,
        zlib.compress(b"x" * 50)[: len(data)] + data,
    ):
        try:
            decompress(attempt, encoding, 100)
        except (MalformedBody, RequestTooLarge):
            continue


@pytest.mark.parametrize(
    ("encoding", "body", "status", "message"),
    [
        ("gzip", gzip.compress(b"x" * 1000, mtime=0), 200, ""),
        ("GZip", gzip.compress(b"hello", mtime=0), 200, ""),
        ("identity", b"hello", 200, ""),
        ("gzip", gzip.compress(b"hello", mtime=0)[:-3], 400, "cut short"),
        ("gzip", b"", 400, "cut short"),
        ("gzip", b"hello", 400, "the body is not gzip"),
        ("gzip", gzip.compress(b"hello", mtime=0) + b"!", 400, "1 bytes follow the end of the gzip body"),
        ("deflate", gzip.compress(b"hello", mtime=0), 400, "not deflate"),
        ("gzip", gzip.compress(b"x" * 1001, mtime=0), 413, "unpacks to more than 1000 bytes"),
        ("gzip", gzip.compress(bytes(5_000_000), mtime=0), 413, "unpacks to more than 1000 bytes"),
        ("br", b"hello", 400, "content-encoding 'br' is not known"),
        ("gzip, deflate", b"hello", 400, "is not known"),
    ],
)  # fmt: skip
def test_a_body_that_does_not_unpack_is_refused_by_name(
    client: Client, encoding: str, body: bytes, status: int, message: str
) -> None:
    reply = client.send(request("/content", body, f"content-encoding: {encoding}")).reply()
    assert reply.status == status
    if message:
        assert message in reply.json()["error"]
    # The request was whole: the connection goes on.
    assert client.send(request("/a")).reply().status == 200


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        (b"gzip", b"gzip"), (b"deflate, gzip;q=1.0, *;q=0.5", b"gzip"), (b"deflate", b"deflate"), (b"GZIP", b"gzip"),
        (b"gzip;q=0", b""), (b"gzip; q=0.0, deflate", b"deflate"), (b"identity", b""), (b"br", b""), (b"", b""),
    ],
)  # fmt: skip
def test_replies_are_packed_as_the_client_wants_it(accepted: bytes, encoding: bytes) -> None:
    payload, headers = compress(b"hello" * 100, accepted)
    assert dict(headers).get(b"content-encoding", b"") == encoding
    assert (decompress(payload, encoding, 500) if encoding else payload) == b"hello" * 100


# Time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beginning",
    [
        b"P",
        b"POST / HTTP/1.1\r\nx: y\r\n",
        request("/", b"abc")[:-1],
        request("/", b"", "transfer-encoding: chunked", length=False),
    ],
    ids=["method", "head", "body", "chunks"],
)
def test_a_request_that_does_not_arrive_is_given_up(beginning: bytes) -> None:
    with running(request_timeout_s=0.2) as server, connected(server.port) as client:
        client.send(beginning)
        assert "did not arrive within 0.2 s" in refusal(client, 408)["error"]
        assert not server.handled
        assert answers(server)


def test_a_client_that_drips_bytes_gains_no_time() -> None:
    with running(request_timeout_s=0.3) as server, connected(server.port) as client:
        started = time.monotonic()
        client.send(b"POST / HTTP/1.1\r\n")
        with suppress(ConnectionError):
            while time.monotonic() < started + 20:
                client.send(b"x")
                time.sleep(0.02)
        assert time.monotonic() < started + 15
        assert [error.code for error in server.refused] == ["malformed_body"]
        assert answers(server)


def test_a_connection_that_asks_nothing_is_closed() -> None:
    with (
        running(idle_timeout_s=0.2) as server,
        connected(server.port) as fresh,
        connected(server.port) as used,
    ):
        used.send(request("/a")).reply()
        assert fresh.ends()
        assert used.ends()
        server.wait(lambda: not server.site.connections)


def test_empty_lines_do_not_keep_a_connection_open() -> None:
    with running(idle_timeout_s=0.3) as server, connected(server.port) as client:
        with suppress(ConnectionError):
            for _ in range(1000):
                client.send(b"\r\n")
                time.sleep(0.02)
        server.wait(lambda: not server.site.connections)
        assert answers(server)


def test_a_slow_answer_is_waited_for() -> None:
    with running(idle_timeout_s=0.1, request_timeout_s=0.1) as server, connected(server.port) as client:
        assert client.send(request("/later?500", b"x")).reply().json()["body"] == "x"


BIG = 200_000


def test_a_client_that_does_not_read_is_not_worked_for() -> None:
    with running() as server, connected(server.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.send(*(request(f"/big?{BIG}", length=False) for _ in range(1000)))
        time.sleep(0.5)
        handled = len(server.handled)
        # What the kernel's buffers hold, and little more: not 200 MB.
        assert handled * BIG < 20_000_000
        assert answers(server)
        # Once it reads, it gets everything.
        for _ in range(1000):
            assert len(client.reply().body) == BIG
        assert len(server.handled) == 1001


def test_a_client_that_never_reads_is_given_up() -> None:
    with running(request_timeout_s=0.3) as server, connected(server.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.send(*(request(f"/big?{BIG}", length=False) for _ in range(100)))
        server.wait(lambda: bool(server.handled) and not server.site.connections)


@pytest.mark.parametrize("close", [False, True])
def test_a_client_that_reads_slowly_gets_everything(monkeypatch: pytest.MonkeyPatch, close: bool) -> None:
    # Longer than any limit in time, as long as something moves.
    monkeypatch.setattr(protocol, "_LINGER_S", 0.1)
    size = 8_000_000
    with running(request_timeout_s=0.3, idle_timeout_s=0.3) as server, connected(server.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.send(request(f"/big?{size}", b"", *(["connection: close"] if close else [])))
        got = 0
        while got < size:
            chunk = client.socket.recv(200_000)
            assert chunk, f"the connection ended after {got} bytes"
            got += len(chunk)
            time.sleep(0.02)


# What is wrong -------------------------------------------------------------------------------------

HEAD = b"POST /a HTTP/1.1\r\nhost: localhost\r\n"
INSIDE = b"GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 50 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\0" * 100,
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: a\0b\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"BREW /coffee HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
        HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(INSIDE),
        HEAD + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n" + chunked(INSIDE),
        HEAD + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        HEAD + b"content-length: 3\r\ncontent-length: 50\r\n\r\nabc" + INSIDE,
        HEAD + b"content-length: 3, 3\r\n\r\nabc",
        HEAD + b"content-length: +3\r\n\r\nabc",
        HEAD + b"content-length: -3\r\n\r\nabc",
        HEAD + b"content-length: 0x3\r\n\r\nabc",
        HEAD + b"content-length: 99999999999999999999999\r\n\r\nabc",
        HEAD + b"content-length: " + b"0" * 5000 + b"3\r\n\r\nabc",
        HEAD + b"content-length : 3\r\n\r\nabc" + INSIDE,
        HEAD + b" content-length: 3\r\n\r\nabc" + INSIDE,
        HEAD + b"x: y\r\n folded: z\r\ncontent-length: 3\r\n\r\nabc",
        HEAD + b"x: y\ncontent-length: 3\r\n\r\nabc",
        HEAD + b"x: y\rcontent-length: 3\r\n\r\nabc",
        b"POST /a HTTP/1.1\nhost: localhost\n\n" + INSIDE,
        HEAD + b"transfer-encoding: xchunked\r\n\r\n" + chunked(INSIDE),
        HEAD + b"transfer-encoding: identity\r\n\r\n" + INSIDE,
        HEAD + b"transfer-encoding: chunked, identity\r\n\r\n" + chunked(INSIDE),
        HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n" + chunked(INSIDE),
        HEAD + b"transfer-encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n3\nabc\n0\n\n" + INSIDE,
        HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n" + INSIDE,
    ],
)
def test_what_is_not_http_or_is_ambiguous_is_refused_once(
    server: Running, client: Client, data: bytes
) -> None:
    client.send(data)
    body = refusal(client, 400)
    assert body["code"] == "malformed_body"
    assert not server.handled
    assert answers(server)


def test_a_fault_in_a_pipeline_comes_after_the_answers_before_it(server: Running, client: Client) -> None:
    client.send(
        request("/later?100", b"1"), request("/a", b"2"), b"nonsense\r\n\r\n", request("/never", b"4")
    )
    assert [client.reply().json()["body"] for _ in range(2)] == ["1", "2"]
    assert refusal(client, 400)["code"] == "malformed_body"
    assert server.handled == ["/later", "/a"]


def test_nothing_after_a_request_that_closes_is_read(server: Running, client: Client) -> None:
    client.send(request("/a", b"1", "connection: close"), request("/never", b"2"))
    assert client.reply().json()["body"] == "1"
    assert client.ends()
    assert server.handled == ["/a"]


@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    answered = Script(b"", [data])
    assert all(reply.startswith(b"HTTP/1.1 ") for reply in answered.wire.written)


def test_a_client_that_goes_in_the_middle_harms_nobody(server: Running) -> None:
    for data in (b"POST", request("/a", b"abc")[:-1], request("/later?50", b"abc"), request("/held")):
        with connected(server.port) as client:
            client.send(data)
            time.sleep(0.02)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.wait(lambda: not server.site.connections)
    assert all(server.do(lambda: [exchange.closed for exchange in server.held]))
    server.do(server.release)
    assert answers(server)


# Stopping ------------------------------------------------------------------------------------------


def test_while_draining_each_connection_ends_after_its_next_reply(server: Running) -> None:
    with connected(server.port) as asked, connected(server.port) as piped, connected(server.port) as begun:
        asked.send(request("/held", b"1"))
        begun.send(request("/a", b"xyz")[:-1])
        server.wait(lambda: bool(server.held) and len(server.site.connections) == 3)
        server.do(lambda: setattr(server.site, "draining", True))
        piped.send(*(request("/a", b"%d" % i) for i in range(5)))
        first = piped.reply()
        assert (first.json()["body"], first.headers["connection"]) == ("0", "close")
        assert piped.ends()
        server.do(server.stop_connections)
        begun.send(b"z")
        whole = begun.reply()
        assert (whole.json()["body"], whole.headers["connection"]) == ("xyz", "close")
        assert server.do(lambda: any(connection.busy for connection in server.site.connections))
        server.do(server.release)
        assert asked.reply().json()["body"] == "1"
        assert asked.ends()
        server.wait(lambda: not any(connection.busy for connection in server.site.connections))


def test_an_idle_connection_is_closed_when_told_to_stop(server: Running, client: Client) -> None:
    client.send(request("/a")).reply()
    server.do(server.stop_connections)
    assert client.ends()


def test_a_connection_is_busy_until_its_answer_has_left(server: Running) -> None:
    with running() as here, connected(here.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.send(request("/big?20000000"))
        here.wait(lambda: bool(here.handled))
        (connection,) = here.do(lambda: list(here.site.connections))
        assert here.do(lambda: connection.idle and connection.busy)
        assert len(client.reply().body) == 20_000_000
        here.wait(lambda: not connection.busy)


# TLS -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture(params=["uvloop", "asyncio"])
def encrypted(
    request: pytest.FixtureRequest, certificate: tuple[Path, Path]
) -> Iterator[tuple[Running, ssl.SSLContext]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with running(tls=context, uv=request.param == "uvloop", max_body_bytes=10_000) as here:
        yield here, ssl.create_default_context(cafile=certificate[0])


def test_with_tls_all_is_the_same(encrypted: tuple[Running, ssl.SSLContext]) -> None:
    server, context = encrypted
    with connected(server.port, tls=context) as client:
        client.send(request("/later?50", b"1"), request("/a", b"2"))
        assert [client.reply().json()["body"] for _ in range(2)] == ["1", "2"]
        started = time.monotonic()
        reply = client.send(request("/a", b"3", "connection: close")).reply()
        assert reply.json()["body"] == "3"
        assert client.ends()
        assert time.monotonic() - started < 1.5, (
            "the end of the connection took as long as that of a refused one"
        )


def test_with_tls_a_refusal_can_be_read(encrypted: tuple[Running, ssl.SSLContext]) -> None:
    server, context = encrypted
    with connected(server.port, tls=context) as client:
        client.send(request("/a", b"x" * 2_000_000))
        assert client.reply().status == 413
    with connected(server.port) as plain:
        plain.send(request("/a"))
        assert plain.ends()
    with connected(server.port, tls=context) as client:
        assert client.send(request("/a")).reply().status == 200


# What is remembered of heads -----------------------------------------------------------------------


LOOP: Any = None
"""A connection in memory needs none."""


class Wire(asyncio.Transport):
    """A transport into memory."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.ended = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.ended

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True

    def get_write_buffer_size(self) -> int:
        return 0


class Script:
    """One connection in memory, fed with pieces; ``seen`` is what the handler was asked."""

    def __init__(self, warm: bytes, pieces: list[bytes], site: Site | None = None) -> None:
        self.seen: list[tuple[bytes, bytes, bytes, bytes, tuple[tuple[bytes, bytes], ...], bool]] = []
        self.wire = Wire()
        self.site = site or Site(self._take, Limits(max_body_bytes=500), LOOP)
        self.site.handler = self._take
        connection = HttpProtocol(self.site)
        connection.connection_made(self.wire)
        for piece in ([warm] if warm else []) + pieces:
            connection.data_received(piece)

    def _take(self, exchange: Exchange) -> None:
        headers = tuple(sorted(exchange.headers.items()))
        self.seen.append(
            (exchange.method, exchange.path, exchange.query, exchange.body, headers, exchange.keep_alive)
        )
        exchange.reply_json(b"{}")


BODIES = [b"", b"a", b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 40, b"0\r\n\r\n", b"1\r\na\r\n0\r\n\r\n"]


@st.composite
def whole_requests(draw: st.DrawFn) -> bytes:
    """A request that is right, if not always one that a connection survives."""
    body = draw(st.sampled_from(BODIES))
    headers = draw(
        st.sampled_from(
            [
                (),
                (),
                (),
                ("x: y",),
                ("X: y",),
                ("connection: close",),
                ("expect: 100-continue",),
                ("parbake-deadline-ms: 5",),
            ]
        )
    )
    path = draw(st.sampled_from(["/", "/a?b"]))
    if draw(st.integers(0, 3)) == 3:
        trailer = draw(
            st.sampled_from(
                [
                    b"",
                    b"x: z\r\n",
                    b"content-length: %d\r\n" % draw(st.integers(0, 60)),
                    b"content-encoding: gzip\r\n",
                ]
            )
        )
        return request(path, b"", *headers, "transfer-encoding: chunked", length=False) + chunked(
            body, trailer=trailer
        )
    if draw(st.booleans()) and not body:
        return request(path, b"", *headers, method=draw(st.sampled_from(["GET", "HEAD"])), length=False)
    return request(path, body, *headers, version=draw(st.sampled_from(["1.1", "1.1", "1.1", "1.0"])))


@given(st.lists(st.lists(whole_requests(), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_what_is_remembered_of_heads_never_changes_what_is_read(
    connections: list[list[bytes]], data: st.DataObject
) -> None:
    site = Site(lambda exchange: None, Limits(max_body_bytes=500), LOOP)
    for requests in connections:
        stream = b"".join(requests)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
        if data.draw(st.booleans()):
            # Each request in one piece: only these are remembered.
            pieces = requests
        else:
            pieces = [
                stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if stream[a:b]
            ]
        expected = Script(b"", [bytes([byte]) for byte in stream])
        got = Script(b"", pieces, site)
        assert got.seen == expected.seen
        assert [r for r in got.wire.written if b" 100 " not in r] == [
            r for r in expected.wire.written if b" 100 " not in r
        ]


def test_a_request_cut_after_its_head_is_not_taken_for_a_whole_one() -> None:
    # The head and one byte more are as long as the head says that the whole is.
    for size in range(300):
        whole = request("/a", b"b" * size)
        head = whole[: whole.index(b"\r\n\r\n")]
        for cut in range(len(head) - 2, len(head) + 5):
            script = Script(whole, [whole[:cut], whole[cut:]])
            assert [seen[3] for seen in script.seen] == [b"b" * size] * 2


@pytest.mark.parametrize("name", ["content-encoding", "inference-header-content-length", "x"])
def test_a_trailer_cannot_change_how_a_body_is_read(name: str) -> None:
    head = request("/a", b"", "transfer-encoding: chunked", "x: head", length=False)
    piece = head + chunked(b"abc", trailer=name.encode() + b": gzip\r\n")
    script = Script(piece, [piece])
    for _, _, _, body, headers, _ in script.seen:
        assert body == b"abc"
        assert dict(headers).get(b"x") == b"head"
        assert name == "x" or name.encode() not in dict(headers)
    assert len(script.seen) == 2


def test_only_so_many_heads_are_remembered() -> None:
    site = Site(lambda exchange: None, Limits(), LOOP)
    for i in range(3000):
        Script(b"", [request(f"/{i}")], site)
        assert len(site.heads) <= protocol._MEMO_HEADS
    Script(b"", [request("/a", b"", "x: " + "y" * 2000)], site)
    assert all(len(head) <= protocol._MEMO_HEAD_BYTES for head in site.heads)


def test_a_method_that_does_not_fit_is_told_which_does(server: Running, client: Client) -> None:
    def answer(exchange: Exchange) -> None:
        try:
            allow(exchange, b"GET", b"HEAD")
        except MethodNotAllowed as error:
            exchange.fail(error)

    server.do(lambda: setattr(server.site, "handler", answer))
    with connected(server.port) as fresh:
        reply: Reply = fresh.send(request("/" + "x" * 5000, method="DELETE")).reply()
        assert reply.status == 405
        assert reply.headers["allow"] == "GET, HEAD"
        assert len(reply.body) < 1000


def test_bodies_that_never_end_cannot_fill_the_memory_together() -> None:
    # Given room for 10,000 bytes of bodies that are still arriving
    with running(max_body_bytes=5_000, max_arriving_bytes=10_000) as server:
        with (
            connected(server.port) as first,
            connected(server.port) as second,
            connected(server.port) as third,
        ):
            # When two have most of it
            for client in (first, second):
                client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" + b"x" * 4_900)
            server.wait(lambda: server.site.arriving_bytes == 9_800)

            # Then a third is told to come again
            third.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n" + b"x" * 400)
            reply = third.reply()
            assert reply.status == 503
            assert json.loads(reply.body)["code"] == "overloaded"

            # And those that end make room
            assert first.send(b"x" * 100).reply().status == 200
        server.wait(lambda: server.site.arriving_bytes == 0)
        with connected(server.port) as fourth:
            assert fourth.send(request("/", b"x" * 4_000)).reply().status == 200


@pytest.mark.parametrize(
    ("value", "later"),
    [
        (b"respond-async", True),
        (b"wait=10, Respond-Async;foo=bar", True),
        (b'handling=lenient,respond-async="x"', True),
        (b"return=minimal", False),
        (b"not-respond-async", False),
        (b"", False),
    ],
)
def test_a_caller_that_would_rather_not_wait_is_known_by_the_head(value: bytes, later: bool) -> None:
    for method in (b"POST", b"GET"):
        head = protocol.Head()
        head.headers = {b"prefer": value}
        head.finish(b"/predict/eta?a=b", method, True)
        # Who answers at once is found by the path, and is not there for those who do not wait.
        assert head.later == (later and method == b"POST")
        assert head.route == (b"" if head.later else b"/predict/eta")
        assert (head.path, head.query) == (b"/predict/eta", b"a=b")


def test_heads_that_come_once_do_not_push_out_those_that_come_again() -> None:
    seldom = {(b"/v2/jobs/x", b"accept"), (b"/predict/eta", b"idempotency-key")}
    for path in (b"/v2/jobs/x", b"/predict/eta"):
        for name in (b"accept", b"idempotency-key"):
            head = protocol.Head()
            head.headers = {name: b"y"}
            head.finish(path, b"POST", True)
            assert head.seldom == ((path, name) in seldom or path == b"/v2/jobs/x")
