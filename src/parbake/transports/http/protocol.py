"""HTTP/1.1 on a bare asyncio protocol: parse, limit, time out, answer in order.

Frameworks and gateways cost more than the models that stand behind them, so the serving port has none:
httptools (the parser of Node.js) feeds `HttpProtocol`, which hands each whole request to a handler as an
`Exchange` and writes the replies in the order of the requests, however they come.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Final, Protocol

import httptools

from parbake.errors import MalformedBody, MethodNotAllowed, Overloaded, ParbakeError, RequestTooLarge
from parbake.transports.http.replies import error_reply, status_of
from parbake.transports.keys import Holder

_MAX_HEAD_BYTES: Final = 32 * 1024
_MAX_HEADERS: Final = 100
_MAX_PIPELINED: Final = 128
_MAX_LENGTH_DIGITS: Final = 18
_STRANGERS_BYTES: Final = 64 * 1024
"""Largest body that is taken before anybody asks whose it is."""
_PACKED_RATIO: Final = 200
_UNPACKED_BYTES: Final = 1024 * 1024
"""What any body may unpack to, however small it is."""
_LINGER_S: Final = 2.0
"""How long a client whose request was refused may be silent before its connection is closed."""
_HALF_CLOSED_S: Final = 1.0
"""How long a client that sends no more is believed to wait for its answer."""
_PIECES: Final = 256
"""Pieces of a body that are kept apart; more of them would take more memory than what they hold."""

JSON: Final = b"application/json"

Handler = Callable[["Exchange"], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take of the server."""

    max_body_bytes: int = 64 * 1024 * 1024
    max_connections: int = 10_000
    request_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    max_arriving_bytes: int = 256 * 1024 * 1024
    """Of unfinished bodies, on all connections together."""


def _reason(status: int) -> bytes:
    return b"HTTP/1.1 %d %s\r\n" % (status, HTTPStatus(status).phrase.encode())


_STATUS_LINES: Final = {int(status): _reason(status) for status in HTTPStatus}
OK_JSON: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
VERSION: Final = b"parbake-version"
"""The header that says which version of a deployment an answer, or an error, is from."""


def ok_json(version: str) -> bytes:
    """`OK_JSON` with the version that answers."""
    return OK_JSON.replace(b"content-length", b"%b: %b\r\ncontent-length" % (VERSION, version.encode()))


class Head:
    """The head of a request, parsed. ``headers`` have names in lower case; of repeated ones the last counts."""

    __slots__ = (
        "headers",
        "holder",
        "json_bytes",
        "keep_alive",
        "later",
        "length",
        "method",
        "path",
        "plain",
        "query",
        "route",
        "seldom",
    )

    def __init__(self) -> None:
        self.method = b""
        self.path = b""
        self.query = b""
        self.headers: dict[bytes, bytes] = {}
        self.keep_alive = True
        self.length = 0
        """Bytes of the body, where it was sent with its length."""
        self.plain = False
        """POST, kept alive, and no header that changes how body or reply are to be read."""
        self.json_bytes = 0
        """Bytes of JSON before binary tensors, where that is all that keeps the head from being plain; else 0."""
        self.later = False
        """Whether the caller would rather not wait for the answer (RFC 7240: ``Prefer: respond-async``)."""
        self.route = b""
        """What is looked up first to find who answers: the path, or nothing where the caller does not wait."""
        self.seldom = False
        """Whether no other request will have the same head."""
        self.holder: Holder | None = None
        """Whose API key the head has, once it is found to be good for the path; None where keys are not needed."""

    def finish(self, url: bytes, method: bytes, keep_alive: bool) -> None:
        """Take in what is known at the end of the head."""
        self.method = method
        self.keep_alive = keep_alive
        if not url.startswith(b"/"):
            # A proxy's form of the URL: scheme and host stand in front.
            scheme, _, rest = url.partition(b"://")
            if scheme.lower() in (b"http", b"https"):
                url = b"/" + rest.partition(b"/")[2]
        self.path, _, self.query = url.partition(b"?")
        self.route = self.path
        if b"prefer" in self.headers and method == b"POST" and b"respond-async" in preferences(self.headers):
            self.later, self.route = True, b""
        self.seldom = b"idempotency-key" in self.headers or self.path.startswith(_JOBS)
        length = self.headers.get(b"content-length", b"0")
        self.length = int(length) if length.isdigit() else 0
        special = self.headers.keys() & _SPECIAL
        self.plain = method == b"POST" and keep_alive and not special
        if method == b"POST" and keep_alive and special == _BINARY:
            size = self.headers[b"inference-header-content-length"]
            self.json_bytes = int(size) if size.isdigit() and len(size) <= _MAX_LENGTH_DIGITS else 0


_SPECIAL: Final = frozenset(
    (b"content-encoding", b"inference-header-content-length", b"parbake-deadline-ms", b"parbake-priority")
)
_BINARY: Final = frozenset((b"inference-header-content-length",))
_JOBS: Final = b"/v2/jobs/"
_UPGRADE: Final = frozenset((b"upgrade", b"connection", b"http2-settings"))
_MEMO_HEADS: Final = 512
_MEMO_HEAD_BYTES: Final = 1024


def preferences(headers: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """What a client would prefer (RFC 7240): names in lower case, with their values or nothing."""
    preferred: dict[bytes, bytes] = {}
    for part in headers.get(b"prefer", b"").split(b","):
        name, _, value = part.partition(b";")[0].partition(b"=")
        preferred.setdefault(name.strip().lower(), value.strip().strip(b'"'))
    return preferred


class Connection(Protocol):
    """Whoever asked, as an `Exchange` knows him."""

    closed: bool
    peer: str

    @property
    def alone(self) -> bool:
        """Whether nobody else is connected."""

    def send(self, exchange: Exchange, data: bytes) -> None:
        """Send a whole reply."""

    def soon(self, callback: Callable[[], None]) -> None:
        """Call at the end of this turn of the loop."""

    def abort(self) -> None:
        """Hang up."""


class Exchange:
    """One request and the place for its reply. `reply` (or `reply_json`) must be called exactly once.

    Made a hundred thousand times a second, so there is no ``__init__`` to call: whoever makes one sets what is
    not the default.
    """

    protocol: Connection
    place: int
    head: Head
    arrived: float
    """When the first byte was read, on the clock of `time.perf_counter`."""
    body = b""
    keep_alive = True
    patience_s = 0.0
    """Time that whoever asked has in any case, whatever the deployment's deadline is."""

    @property
    def method(self) -> bytes:
        """GET, POST, ..."""
        return self.head.method

    @property
    def path(self) -> bytes:
        """The URL before the question mark."""
        return self.head.path

    @property
    def query(self) -> bytes:
        """The URL after the question mark."""
        return self.head.query

    @property
    def headers(self) -> dict[bytes, bytes]:
        """Names in lower case; of repeated headers the last counts."""
        return self.head.headers

    def reply_json(self, payload: bytes) -> None:
        """200 with a JSON body and nothing special: the fast way out."""
        if not self.keep_alive or self.head.method == b"HEAD":
            self.reply(200, payload)
            return
        self.protocol.send(self, OK_JSON % (len(payload), payload))

    def reply(
        self,
        status: int,
        payload: bytes,
        content_type: bytes = JSON,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """Any reply."""
        head = [
            _STATUS_LINES[status],
            b"content-type: ",
            content_type,
            b"\r\ncontent-length: %d" % len(payload),
        ]
        for name, value in headers:
            head += (b"\r\n", name, b": ", value)
        if not self.keep_alive:
            head.append(b"\r\nconnection: close")
        head.append(b"\r\n\r\n")
        if self.method != b"HEAD":
            head.append(payload)
        self.protocol.send(self, b"".join(head))

    def fail(self, error: ParbakeError) -> None:
        """Reply with an error: its status, its code, path and hint as JSON."""
        status, payload, headers = error_reply(error)
        self.reply(status, payload, JSON, headers)

    @property
    def closed(self) -> bool:
        """Whether the client has gone."""
        return self.protocol.closed

    @property
    def client(self) -> str:
        """Name of the client by its API key, "" where none is needed."""
        holder = self.head.holder
        return holder.name if holder is not None else ""

    @property
    def peer(self) -> str:
        """The client's address, or "" for a Unix socket."""
        return self.protocol.peer

    def content(self, limit: int) -> bytes:
        """The body with its content encoding undone. Raises `MalformedBody` or `RequestTooLarge`."""
        encoding = self.headers.get(b"content-encoding")
        if not encoding or encoding == b"identity":
            return self.body
        return decompress(self.body, encoding.strip().lower(), limit)


@dataclass(slots=True)
class Site:
    """What all connections of one listening socket share.

    ``heads`` remembers parsed heads by their bytes, to the end of the empty line: a client on a kept connection
    sends the same head again and again, and a head that is equal to the byte means the same.
    """

    handler: Handler
    limits: Limits
    loop: asyncio.AbstractEventLoop
    draining: bool = False
    """Whether kept connections shall be closed after the next reply."""
    connections: set[HttpProtocol] = field(default_factory=set)
    refused: Callable[[ParbakeError], None] = lambda error: None
    """Told of what is refused before it is a whole request."""
    admits: Callable[[Mapping[bytes, bytes]], Holder] | None = None
    """Says by the headers whose API key a request has, or raises; None where none is needed."""
    heads: dict[bytes, Head] = field(default_factory=dict)
    arriving_bytes: int = 0
    """Bytes of bodies whose end is not here yet."""

    def remember(self, head_bytes: bytes, head: Head) -> None:
        """Keep a parsed head for the next request like it."""
        if len(head_bytes) > _MEMO_HEAD_BYTES or not head.keep_alive or head.seldom:
            return
        if len(self.heads) >= _MEMO_HEADS:
            self.heads.clear()
        self.heads[head_bytes] = head

    def check_time(self) -> None:
        """End what takes too long; to be called about once a second."""
        now = perf_counter()
        for connection in list(self.connections):
            connection.check_time(now)


class HttpProtocol(asyncio.Protocol):
    """One connection."""

    __slots__ = (
        "_arrived", "_backlog", "_body", "_body_bytes", "_early", "_ended", "_exchange", "_feeding", "_handler",
        "_head", "_head_bytes", "_head_end", "_header_count", "_heads", "_held", "_in_head", "_in_trailer",
        "_last", "_limits", "_moved", "_next_out", "_next_place", "_parser", "_partial_bytes", "_plain",
        "_reading", "_site", "_torn", "_transport", "_unsent", "_url", "_whole", "_writable", "_write",
        "closed", "closing", "peer",
    )  # fmt: skip

    def __init__(self, site: Site) -> None:
        self._site = site
        self._handler = site.handler
        self._limits = site.limits
        self._heads = site.heads
        self._transport: asyncio.Transport | None = None
        self._write: Callable[[bytes], None] = _nowhere
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self._head = Head()
        self._plain = True
        """Whether the next byte begins a request and nothing stands in its way."""
        self._whole = 0
        self._feeding = False
        self._in_head = False
        self._in_trailer = False
        self._head_bytes = 0
        self._partial_bytes = 0
        """Bytes read since the last whole header."""
        self._header_count = 0
        self._head_end = 0
        """Length of the last head that was looked up."""
        self._body: list[bytes | bytearray] = []
        self._body_bytes = 0
        self._url = b""
        self._next_place = 0
        self._next_out = 0
        self._early: dict[int, bytes] = {}
        self._reading = True
        self._writable = True
        self._ended = 0.0
        """When the last reply was written; from then on what still comes is thrown away."""
        self._torn = False
        """Whether a request was refused before all of it was here."""
        self._unsent = 0
        self._moved = 0.0
        self._last = 0.0
        self._arrived = 0.0
        self._held: deque[Exchange] = deque()
        """Whole requests that came while nothing more was to be taken."""
        self._backlog: deque[bytes] = deque()
        self.closed = False
        self.closing = False
        self.peer = ""

    # Connection ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = transport  # type: ignore[assignment]  # always a stream transport
        self._write = transport.write  # type: ignore[attr-defined]  # a stream transport
        self._last = perf_counter()
        peername = transport.get_extra_info("peername")
        self.peer = peername[0] if isinstance(peername, tuple) else ""
        over = len(self._site.connections) - self._limits.max_connections
        self._site.connections.add(self)
        if over >= self._limits.max_connections:
            # So many are being told already that telling is too much.
            self._close_soon()
            self.abort()
        elif over >= 0:
            limit = self._limits.max_connections
            self._refuse(503, Overloaded(f"{limit} connections are open, and that is the limit"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone; replies on their way are dropped."""
        self.closed = True
        self._plain = False
        self._write = _nowhere
        if self._exchange is not None:
            self._forget_body()
        self._site.connections.discard(self)
        self._early.clear()
        self._held.clear()
        self._backlog.clear()

    def eof_received(self) -> bool | None:
        """The client sends no more. What can be answered in a moment is; then it counts as gone.

        Nothing tells a client that closed one direction, and waits, from one that went away.
        """
        if self._outstanding and not self._discarding:
            self._close_soon()
            self._site.loop.call_later(_HALF_CLOSED_S, self._presume_gone)
            return True
        return False

    def _presume_gone(self) -> None:
        if self._outstanding and not self.closed:
            self.abort()

    def pause_writing(self) -> None:
        """The client reads too slowly: no more requests are taken from it until it has caught up."""
        self._writable = False
        self._pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._writable = True
        self._resume()

    def data_received(self, data: bytes) -> None:
        """Bytes of one or more requests."""
        now = perf_counter()
        if self._plain:
            # The usual case: one whole request, with a head that has been seen before, as long as the last one.
            end = self._head_end
            head = self._heads.get(data[:end])
            if head is None:
                end = self._head_end = data.find(b"\r\n\r\n") + 4
                head = self._heads.get(data[:end])
            if head is not None and len(data) == end + head.length:
                self._last = now
                place = self._next_place
                self._next_place = place + 1
                exchange = Exchange()
                exchange.protocol = self
                exchange.place = place
                exchange.head = head
                exchange.arrived = now
                exchange.body = data[end:]
                if self._site.draining:
                    exchange.keep_alive = False
                    self._close_soon()
                elif place - self._next_out >= _MAX_PIPELINED:
                    self._pause()
                self._handler(exchange)
                return
        self._feed(data, now)

    def _feed(self, data: bytes, now: float) -> None:
        """The general case: whatever the parser makes of it."""
        if self.closing:
            self._last = now
            return
        if not self._reading:
            # Came in before the transport took notice of the pause.
            self._backlog.append(data)
            return
        fresh = self._exchange is None
        if fresh:
            self._arrived = now
        unfinished = self._head if self._in_head or self._in_trailer else None
        rest: bytes | None = data
        while rest is not None:
            data, rest = rest, None
            self._whole = 0
            self._feeding = True
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                rest = self._without_upgrade(data[upgrade.args[0] :])
                if rest is None:
                    return
            except httptools.HttpParserError as error:
                if not self.closing:
                    self._refuse(400, MalformedBody(f"not HTTP/1.1: {error}"))
                return
            finally:
                self._feeding = False
        if self._whole or self._exchange is not None:
            # Empty lines between requests are no sign of life.
            self._last = now
        if fresh and self._whole == 1 and self._exchange is None:
            end = data.find(b"\r\n\r\n") + 4
            if end > 4 and len(data) == end + self._head.length and b"expect" not in self._head.headers:
                self._site.remember(data[:end], self._head)
        if (self._in_head or self._in_trailer) and self._head is unfinished:
            # The parser keeps what is not a whole header yet.
            self._partial_bytes += len(data)
            if self._partial_bytes > _MAX_HEAD_BYTES and not self.closing:
                self._head_too_large()
        if not self._reading:
            self._resume()

    def _without_upgrade(self, rest: bytes) -> bytes | None:
        """A request that offers another protocol, as if it did not (RFC 9110, 7.8); ``rest`` follows its head.

        The parser would take what follows for the other protocol: a new one is to be told the same head without
        the offer. None where the request cannot be answered.
        """
        exchange, head = self._exchange, self._head
        method = self._parser.get_method()
        if exchange is None or self.closing:
            return None
        if method == b"CONNECT":
            self._refuse(400, MalformedBody("this server is no proxy"))
            return None
        self._exchange = None
        self._next_place -= 1
        lines = [b"%b %b HTTP/%b" % (method, self._url, self._parser.get_http_version().encode())]
        lines += [b"%b: %b" % item for item in head.headers.items() if item[0] not in _UPGRADE]
        self._parser = httptools.HttpRequestParser(self)
        return b"%b\r\n\r\n%b" % (b"\r\n".join(lines), rest)

    # Parser callbacks ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._head = Head()
        self._plain = False
        self._in_head = True
        self._in_trailer = False
        self._head_bytes = self._partial_bytes = 0
        self._header_count = 0
        self._url = b""
        self._body = []
        self._body_bytes = 0
        if self.closing:
            return
        self._exchange = self._begin(self._head)

    def _begin(self, head: Head) -> Exchange:
        exchange = Exchange()
        exchange.protocol, exchange.place, exchange.head = self, self._next_place, head
        exchange.arrived = self._arrived
        self._next_place += 1
        return exchange

    def on_url(self, url: bytes) -> None:
        """The request target, or a piece of it."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if not self._in_head or self.closing:
            # What stands behind a chunked body must not change how the body is read.
            return
        self._head.headers[name.lower()] = value
        self._header_count += 1
        self._partial_bytes = 0
        self._head_bytes += len(name) + len(value) + 4
        if self._header_count > _MAX_HEADERS:
            self._refuse(431, RequestTooLarge(f"the request has more than {_MAX_HEADERS} headers"))
        elif self._head_bytes > _MAX_HEAD_BYTES:
            self._head_too_large()

    def on_headers_complete(self) -> None:
        """The head is complete; a body that is too large is refused before it is sent."""
        self._in_head = False
        if self.closing:
            return
        if len(self._url) > _MAX_HEAD_BYTES:
            self._head_too_large()
            return
        headers = self._head.headers
        length = headers.get(b"content-length")
        if length is not None and length.isdigit():
            if len(length) > _MAX_LENGTH_DIGITS:
                self._refuse(400, MalformedBody("content-length has too many digits"))
                return
            if int(length) > self._limits.max_body_bytes:
                self._too_large(int(length))
                return
        if self._site.admits is not None and not self._known(headers):
            return
        if (
            headers.get(b"expect", b"").lower() == b"100-continue"
            # Before the replies of others it would be taken for part of them.
            and self._next_place - 1 == self._next_out
            and self._parser.get_http_version() == "1.1"
        ):
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _known(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a body may be taken from this client; one that has no key is not worth the memory."""
        length = headers.get(b"content-length", b"0")
        small = length.isdigit() and int(length) <= _STRANGERS_BYTES
        if self._site.admits is None or (small and b"transfer-encoding" not in headers):
            return True
        try:
            self._site.admits(headers)
        except ParbakeError as error:
            self._refuse(status_of(type(error)), error)
            return False
        return True

    def on_chunk_header(self) -> None:
        """A chunk begins, or after the last one the trailer."""
        self._in_trailer = True
        self._partial_bytes = 0

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self.closing:
            return
        self._in_trailer = False
        self._body_bytes += len(body)
        self._site.arriving_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._too_large(self._body_bytes)
            return
        if self._site.arriving_bytes > self._limits.max_arriving_bytes:
            self._refuse(
                503,
                Overloaded(
                    f"{self._site.arriving_bytes} bytes of bodies are arriving at once, all that is held at a time",
                    hint="send again in a moment, and fewer large bodies at once",
                ),
            )
            return
        pieces = self._body
        pieces.append(body)
        if len(pieces) > _PIECES:
            first = pieces[0]
            whole = first if isinstance(first, bytearray) else bytearray(first)
            for piece in pieces[1:]:
                whole += piece
            self._body = [whole]

    def on_message_complete(self) -> None:
        """A whole request is here."""
        self._in_trailer = False
        exchange = self._exchange
        parser = self._parser
        if exchange is None or self.closing or parser.should_upgrade():
            return
        self._exchange = None
        self._forget_body()
        self._whole += 1
        head = self._head
        # HTTP/1.0 would have to negotiate a kept connection: it gets none.
        keep_alive = parser.should_keep_alive() and parser.get_http_version() == "1.1"
        head.finish(self._url, parser.get_method(), keep_alive)
        body = self._body
        first = body[0] if len(body) == 1 else b""
        exchange.body = first if isinstance(first, bytes) and first else b"".join(body)
        exchange.keep_alive = keep_alive and not self._site.draining
        self._plain = True
        if not exchange.keep_alive:
            self._close_soon()
        elif self._next_place - self._next_out >= _MAX_PIPELINED:
            self._pause()
        if self._held or not self._writable or self._next_place - self._next_out > _MAX_PIPELINED:
            # Of what was read in one piece, too: each reply would wait in memory for a client that does not read.
            self._held.append(exchange)
            self._pause()
        else:
            self._handler(exchange)
        # The next request of a pipeline begins where this one ended.
        self._arrived = perf_counter()

    # Replies ---------------------------------------------------------------------------------------

    def send(self, exchange: Exchange, data: bytes) -> None:
        """Write a reply when its turn has come."""
        if exchange.place != self._next_out:
            if not self.closed:
                self._early[exchange.place] = data
            return
        self._next_out += 1
        self._write(data)
        if self._early or self.closing or not self._reading:
            self._after_send()

    def _after_send(self) -> None:
        early = self._early
        while early and (data := early.pop(self._next_out, b"")):
            self._next_out += 1
            self._write(data)
        if self.closing and not self._outstanding:
            self._end()
        elif not self._reading:
            self._resume()

    def soon(self, callback: Callable[[], None]) -> None:
        """Call at the end of this turn of the loop, when all that has come in has been read."""
        self._site.loop.call_soon(callback)

    @property
    def alone(self) -> bool:
        """Whether no other connection is open."""
        return len(self._site.connections) == 1

    @property
    def _outstanding(self) -> int:
        """Whole requests that have not been answered."""
        begun = 1 if self._exchange is not None else 0
        return self._next_place - self._next_out - begun

    @property
    def _given(self) -> int:
        """Requests that the handler has been given and not answered, and the one that is coming in."""
        return self._next_place - self._next_out - len(self._held)

    @property
    def idle(self) -> bool:
        """Whether the connection stands between two requests."""
        return self._exchange is None and self._next_place == self._next_out

    @property
    def busy(self) -> bool:
        """Whether anything has been accepted that the client has not been sent the answer of."""
        if self.closed or self._transport is None:
            return False
        return not self.idle or self._transport.get_write_buffer_size() > 0

    @property
    def _discarding(self) -> bool:
        return self._ended > 0

    def _close_soon(self) -> None:
        """Take no further request."""
        self.closing = True
        self._plain = False

    def _pause(self) -> None:
        self._plain = False
        if self._reading and self._transport is not None and not self.closed:
            self._reading = False
            if not self._transport.is_closing():
                self._transport.pause_reading()

    def _resume(self) -> None:
        if self._reading or self._feeding or self.closed or self._transport is None:
            return
        if self._given >= _MAX_PIPELINED // 2:
            return
        # A reply that comes at once must not begin this anew.
        self._feeding = True
        try:
            while self._held and self._writable and self._given < _MAX_PIPELINED:
                self._handler(self._held.popleft())
        finally:
            self._feeding = False
        if self._held or not self._writable:
            return
        self._reading = True
        while self._backlog and self._reading:
            self._feed(self._backlog.popleft(), perf_counter())
        if self._reading:
            self._plain = self._exchange is None and not self.closing
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _too_large(self, size: int) -> None:
        limit = self._limits.max_body_bytes
        self._refuse(
            413,
            RequestTooLarge(
                f"the body has at least {size} bytes, the limit is {limit}",
                hint="send fewer rows per request, or raise max_body_bytes",
            ),
        )

    def _head_too_large(self) -> None:
        self._refuse(431, RequestTooLarge(f"the head of the request is over {_MAX_HEAD_BYTES} bytes"))

    def _forget_body(self) -> None:
        """The body arrives no more: it is a request now, or given up."""
        self._site.arriving_bytes -= self._body_bytes
        self._body_bytes = 0

    def _refuse(self, status: int, error: ParbakeError) -> None:
        """Answer a request that cannot be read to its end, then close."""
        self._site.refused(error)
        exchange = self._exchange
        if exchange is None:
            exchange = self._begin(Head())
        self._exchange = None
        self._in_head = self._in_trailer = False
        self._body = []
        self._forget_body()
        self._torn = True
        self._close_soon()
        exchange.keep_alive = False
        _, payload, headers = error_reply(error)
        exchange.reply(status, payload, JSON, headers)

    def _end(self) -> None:
        """Close so that the last reply arrives: a close with unread input would reset the connection.

        So what the client still sends is read and thrown away, until it closes, or falls silent (see `check_time`).
        """
        transport = self._transport
        if transport is None or self.closed or self._discarding:
            return
        self._ended = perf_counter()
        if not self._reading:
            self._reading = True
            if not transport.is_closing():
                transport.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()
        elif not self._torn:
            # TLS knows no half-closed connection.
            transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def stop(self) -> None:
        """Take no further request: close now if idle, else after the replies that are due."""
        if self.idle:
            if self._transport is not None:
                self._transport.close()
        else:
            if self._exchange is None:
                self._close_soon()

    def check_time(self, now: float) -> None:
        """End what takes too long; ``now`` is on the clock of `time.perf_counter`."""
        transport = self._transport
        if self.closed or transport is None:
            return
        unsent = transport.get_write_buffer_size()
        if unsent:
            unsent += _kernel_bytes(transport)
        if unsent != self._unsent or not unsent:
            self._unsent, self._moved = unsent, now
        elif now - self._moved > self._limits.request_timeout_s:
            # The client reads nothing.
            self.abort()
            return
        if self._discarding:
            silent = now - max(self._last, self._ended) > _LINGER_S
            if not unsent and (silent or now - self._ended > self._limits.request_timeout_s):
                self.abort()
            return
        if self._exchange is not None:
            if now - self._arrived > self._limits.request_timeout_s:
                error = MalformedBody(
                    f"the request did not arrive within {self._limits.request_timeout_s:g} s",
                    hint="send faster, or raise request_timeout_s",
                )
                self._refuse(408, error)
        elif self.idle and not unsent and now - self._last > self._limits.idle_timeout_s:
            transport.close()


def _kernel_bytes(transport: asyncio.Transport) -> int:
    """Bytes that the kernel has taken and the client has not: they tell a slow reader from none."""
    count = array("i", [0])
    try:
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
    except (OSError, AttributeError):
        return 0
    return count[0]


def _nowhere(data: bytes) -> None:
    """Where replies go when the client has gone."""


def decompress(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Undo gzip or deflate (RFC 9110), giving at most ``limit`` bytes, and no multitude of what came in.

    Raises `MalformedBody`, `RequestTooLarge`.
    """
    if encoding in (b"gzip", b"x-gzip"):
        wbits = 31
    elif encoding == b"deflate":
        # Some senders leave the zlib header out: "deflate", and two bytes that make a multiple of 31.
        has_header = len(body) > 1 and body[0] & 0x0F == 8 and (body[0] * 256 + body[1]) % 31 == 0
        wbits = 15 if has_header else -15
    else:
        raise MalformedBody(
            f"content-encoding {encoding.decode('latin-1')!r} is not known", hint="use gzip, deflate or none"
        )
    unpacker = zlib.decompressobj(wbits)
    # Whoever sends little shall not make us hold much.
    most = min(limit, max(_PACKED_RATIO * len(body), _UNPACKED_BYTES))
    try:
        content = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise MalformedBody(f"the body is not {encoding.decode()}: {error}") from error
    if len(content) > most:
        if most < limit:
            raise RequestTooLarge(
                f"the body unpacks to more than {_PACKED_RATIO} times its {len(body)} bytes",
                hint="send it without content-encoding",
            )
        raise RequestTooLarge(
            f"the body unpacks to more than {limit} bytes", hint="send fewer rows, or raise max_body_bytes"
        )
    if not unpacker.eof:
        raise MalformedBody(f"the {encoding.decode()} body is cut short")
    if unpacker.unused_data:
        raise MalformedBody(
            f"{len(unpacker.unused_data)} bytes follow the end of the {encoding.decode()} body"
        )
    return content


def compress(payload: bytes, accepted: bytes) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """The payload as the client's accept-encoding has it, with the header that says so."""
    wanted = {
        name.strip(): weight.replace(b" ", b"").partition(b"q=")[2]
        for name, _, weight in (part.partition(b";") for part in accepted.lower().split(b","))
    }
    wanted = {name: weight for name, weight in wanted.items() if weight.strip(b"0.") or not weight}
    if b"gzip" in wanted:
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        return packer.compress(payload) + packer.flush(), ((b"content-encoding", b"gzip"),)
    if b"deflate" in wanted:
        return zlib.compress(payload, 1), ((b"content-encoding", b"deflate"),)
    return payload, ()


def allow(exchange: Exchange, *methods: bytes) -> None:
    """Raise `MethodNotAllowed` unless the request's method is one of these."""
    if exchange.method not in methods:
        names = ", ".join(method.decode() for method in methods)
        raise MethodNotAllowed(
            f"{exchange.method.decode('latin-1')} {exchange.path[:200].decode('latin-1')}",
            hint=f"use {names}",
            methods=tuple(method.decode() for method in methods),
        )
