"""One version's URL for predictions: read, predict, write, count."""

from __future__ import annotations

from time import perf_counter
from typing import Final, Protocol

from parbake.errors import InvalidInput, MalformedBody, ParbakeError
from parbake.queue.service import AGAIN
from parbake.runtime.waiting import HIGH, LOW, NORMAL
from parbake.serving.fallback import RESCUED, Asked
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.transports.failures import shown, unexpected
from parbake.transports.http.oip import InferCall
from parbake.transports.http.protocol import JSON, VERSION, Exchange, allow, compress, ok_json
from parbake.transports.http.replies import error_reply

_BINARY: Final = b"application/octet-stream"
_COMPRESS_FROM_BYTES: Final = 1024
_PRIORITIES: Final = {b"high": HIGH, b"normal": NORMAL, b"low": LOW}


class Codec(Protocol):
    """Reads one form of request and writes the replies that belong to it."""

    def read(self, body: bytes, json_bytes: int | None) -> InferCall:
        """The call in a body. Raises `InvalidRequest`."""

    def write(self, answer: Answer, call: InferCall) -> tuple[bytes, int | None]:
        """The reply's body, and the length of its JSON part where binary data follows."""


class PredictionEndpoint:
    """Answers requests of one form for one served version."""

    def __init__(self, served: ServedVersion, codec: Codec, max_body_bytes: int) -> None:
        self._served = served
        self._codec = codec
        self._max_body_bytes = max_body_bytes
        self._answered = served.stats.answered
        self._ok = ok_json(served.version)
        self._version: tuple[tuple[bytes, bytes], ...] = ((VERSION, served.version.encode()),)

    def forget(self) -> None:
        """Give up what is kept for requests to come: there will be none."""

    def answer(self, exchange: Exchange) -> None:
        """Handle one request; the reply is written now or later."""
        served = self._served
        try:
            call, deadline, priority = self.read(exchange)
            parsed = perf_counter()

            def done(result: Answer | ParbakeError) -> None:
                if isinstance(result, ParbakeError):
                    self._fail(exchange, result)
                else:
                    self._send(exchange, call, result, parsed)

            inputs = call.inputs
            answer = served.predict(
                inputs.raws,
                inputs.rows,
                inputs.shapes,
                deadline,
                done,
                exchange,
                exchange.arrived,
                priority,
                exchange.client,
            )
        except ParbakeError as error:
            self._fail(exchange, error)
            return
        except Exception:
            self._failed_unexpectedly(exchange)
            return
        if answer is not None:
            self._send(exchange, call, answer, parsed)

    def read(self, exchange: Exchange) -> tuple[InferCall, float, int]:
        """The call in a request, its deadline (on the clock of `time.perf_counter`) and its priority.

        Raises `ParbakeError`.
        """
        headers = exchange.headers
        if exchange.method != b"POST":
            allow(exchange, b"POST")
        body = exchange.body
        if b"content-encoding" in headers:
            body = exchange.content(self._max_body_bytes)
        size = headers.get(b"inference-header-content-length")
        call = self._codec.read(body, None if size is None else _whole(size))
        # A caller may want it sooner than the deployment promises, never later.
        limits_s = [self._served.deadline_s]
        if exchange.patience_s:
            limits_s = [max(limits_s[0], exchange.patience_s)]
        if call.timeout_s:
            limits_s.append(call.timeout_s)
        if b"parbake-deadline-ms" in headers:
            limits_s.append(_deadline_ms(headers[b"parbake-deadline-ms"]) / 1000)
        priority = call.priority
        if b"parbake-priority" in headers:
            priority = _priority(headers[b"parbake-priority"])
        return call, exchange.arrived + min(limits_s), priority

    def check(self, exchange: Exchange, reader: PredictionEndpoint | None = None) -> bool:
        """Whether a request can be read and fits the contract; where it does not, the reply has been given.

        ``reader`` reads it where that is another version of the deployment.
        """
        try:
            call, _, _ = (reader or self).read(exchange)
            self._check_alone(call.inputs.rows)
        except ParbakeError as error:
            self._fail(exchange, error)
            return False
        except Exception:
            self._failed_unexpectedly(exchange)
            return False
        return True

    def _check_alone(self, rows: int) -> None:
        """Raise `Overloaded` where the model would take too long for so many rows, and nothing else could answer."""
        served = self._served
        if served.batcher is not None and served.get is None and served.fallback is None:
            served.batcher.check_alone(rows, served.deadline_s)

    def take(self, exchange: Exchange, call: InferCall, result: Answer | ParbakeError, parsed: float) -> None:
        """Reply with what this version said to a request that was read for all of its deployment."""
        if isinstance(result, ParbakeError):
            self._fail(exchange, result)
        else:
            self._send(exchange, call, result, parsed)

    def refuse(self, exchange: Exchange, error: ParbakeError) -> None:
        """Reply with an error."""
        self._fail(exchange, error)

    def fail_unexpectedly(self, exchange: Exchange) -> None:
        """Reply to a bug of ours; call it in an except block."""
        self._failed_unexpectedly(exchange)

    def _send(self, exchange: Exchange, call: InferCall, answer: Answer, parsed: float) -> None:
        try:
            payload, json_bytes = self._codec.write(answer, call)
        except ParbakeError as error:
            self._fail(exchange, error)
            return
        except Exception:
            self._failed_unexpectedly(exchange)
            return
        accepted = exchange.headers.get(b"accept-encoding")
        small = accepted is None or len(payload) < _COMPRESS_FROM_BYTES
        if json_bytes is None and small and not answer.fallback and exchange.keep_alive:
            exchange.protocol.send(exchange, self._ok % (len(payload), payload))
        else:
            extra = self._version
            if json_bytes is not None:
                extra += ((b"inference-header-content-length", b"%d" % json_bytes),)
            if answer.fallback:
                extra += ((b"parbake-fallback", answer.fallback.encode()),)
            if accepted is not None and len(payload) >= _COMPRESS_FROM_BYTES:
                payload, encoding = compress(payload, accepted)
                extra += encoding
            exchange.reply(200, payload, JSON if json_bytes is None else _BINARY, extra)
        arrived = exchange.arrived
        self._answered(
            parsed - arrived,
            answer.queue_s,
            answer.model_s,
            perf_counter() - arrived,
            answer.rows,
            answer.baked_rows,
        )

    def _rescue(self, exchange: Exchange, error: ParbakeError) -> None:
        """Have the fallback answer a request that went a short way, in place of an error that the model gave."""
        served, fallback = self._served, self._served.fallback
        if fallback is None or not isinstance(error, RESCUED):
            self._fail(exchange, error)
            return
        try:
            call = self._codec.read(exchange.body, exchange.head.json_bytes or None)
            parsed = perf_counter()
            inputs = call.inputs
            deadline = exchange.arrived + served.deadline_s
            asked = Asked(
                inputs.raws,
                inputs.rows,
                inputs.shapes,
                deadline,
                exchange,
                exchange.arrived,
                call.priority,
                exchange.client,
            )
            answer = fallback.instead(
                served, asked, error, lambda result: self.take(exchange, call, result, parsed)
            )
        except ParbakeError as refused:
            self._fail(exchange, refused)
            return
        except Exception:
            self._failed_unexpectedly(exchange)
            return
        if answer is not None:
            self._send(exchange, call, answer, parsed)

    def _failed_unexpectedly(self, exchange: Exchange) -> None:
        self._served.refused(fail_unexpectedly(exchange).code, exchange.arrived)

    def _fail(self, exchange: Exchange, error: ParbakeError) -> None:
        code = error.code
        error, number = shown(error, self._served.name)
        status, payload, headers = error_reply(error, number)
        if not (exchange.patience_s and status in AGAIN):
            # A job that is tried again was not refused.
            self._served.refused(code, exchange.arrived)
        exchange.reply(status, payload, JSON, self._version + headers)


def fail_unexpectedly(exchange: Exchange) -> ParbakeError:
    """A bug of ours: 500 with a number, the traceback in the log under it. Call it in an except block."""
    error, number = unexpected(exchange.path.decode("latin-1"))
    status, payload, headers = error_reply(error, number)
    exchange.reply(status, payload, JSON, headers)
    return error


def _deadline_ms(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise InvalidInput(
            f"a deadline is a whole number of milliseconds, got {value[:40].decode('latin-1')!r}",
            path="parbake-deadline-ms",
            hint="send 250 for a quarter of a second",
        )
    milliseconds = int(value)
    if milliseconds == 0:
        raise InvalidInput(
            "a deadline of 0 ms cannot be met", path="parbake-deadline-ms", hint="send at least 1"
        )
    return milliseconds


def _priority(value: bytes) -> int:
    found = _PRIORITIES.get(value.lower())
    if found is None:
        raise InvalidInput(
            f"no priority {value[:40].decode('latin-1')!r}",
            path="parbake-priority",
            hint="high, normal or low",
        )
    return found


def _whole(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise MalformedBody(f"expected a whole number in a header, got {value[:40].decode('latin-1')!r}")
    return int(value)
