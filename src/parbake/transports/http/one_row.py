"""The short way for what most callers send: one row of one matrix of numbers, as plain JSON.

Nothing is left out on it: the body is decoded with types; name, datatype, shape and number of values are held
against the contract; the deadline is kept; everything is counted. Whatever does not fit goes the general way,
which answers it or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Final, cast

from parbake.contract.key import key_of
from parbake.contract.where import JOINED, MODEL
from parbake.errors import ParbakeError
from parbake.logs import log
from parbake.runtime.batcher import Job, Outcome
from parbake.serving.ports import Recorder
from parbake.serving.service import ServedVersion
from parbake.serving.stats import FOLD_AT
from parbake.transports.http.endpoint import PredictionEndpoint
from parbake.transports.http.memo import ReplyMemo
from parbake.transports.http.oip import InferCodec
from parbake.transports.http.protocol import Exchange

_IN_A_ROW: Final = 32
"""Most replies that wait for the end of a turn."""


class OneRowEndpoint(PredictionEndpoint):
    """A `PredictionEndpoint` with the short way in front."""

    def __init__(
        self, served: ServedVersion, codec: InferCodec, max_body_bytes: int, memo: ReplyMemo
    ) -> None:
        super().__init__(served, codec, max_body_bytes)
        self._read_row = codec.read_row
        self._write_row = codec.write_row
        self._write_rows = codec.write_rows
        self._log = served.stats.log
        self._settle = served.stats.settle
        # Bound once: jobs are compared by it.
        self._together = self._all_done
        self._get = served.get
        self._flights = served.flights
        self._recorder = served.recorder
        self._note_key = served.recorder.note_key if served.recorder is not None else None
        self._logs = served.recorder is not None and self._note_key is None
        self._noting_turns = (
            self._logs
            and served.recorder is not None
            and not (served.recorder.wants_inputs or served.recorder.wants_outputs)
        )
        """Whether rows that are answered together are noted together."""
        self._baked_in = (
            None if served.head is not None and served.table is not None else served.where_baked(b"")
        )
        """Where all baked rows are answered; None where there are two places."""
        self._keeps_inputs = served.recorder is not None and served.recorder.wants_inputs
        self._run = served.batcher.submit if served.batcher is not None and served.mode != "static" else None
        self._memo = memo
        self._replies = memo.shelf()
        """Of bodies that the table answered."""
        self._rereads = self._get is not None and not self._keeps_inputs
        self._baked: list[tuple[Exchange, bytes, float, bytes, bytes]] = []
        """Replies of this turn of the loop, when their requests had been read, keys and records."""
        self._shapes = (served.contract.inputs[0].shape,)

    def answer(self, exchange: Exchange) -> None:
        """Handle one request; the reply is written now or later."""
        if not (exchange.head.plain and exchange.keep_alive):
            super().answer(exchange)
            return
        body = exchange.body
        get = self._get
        if self._rereads and get is not None:
            known = self._replies.get(body)
            if known is not None:
                # The table is asked every time; only reading the body and writing the reply are spared.
                key, baked, reply = known
                if get(key) == baked:
                    self._answer(exchange, reply, perf_counter(), key, baked)
                    return
        row = self._read_row(body)
        if row is None:
            super().answer(exchange)
            return
        raw, request_id = row
        parsed = perf_counter()
        key = b""
        if get is not None:
            key = key_of(raw)
            record = get(key)
            if record is not None:
                reply = self._write_row(record, request_id)
                if self._keeps_inputs:
                    self._note(exchange, key, self._served.where_baked(key), (raw,), record)
                self._answer(exchange, reply, parsed, key, record)
                if not request_id and self._rereads:
                    self._memo.offer(self._replies, body, (key, record, reply))
                return
        if self._run is None or self._served.closed:
            super().answer(exchange)
            return
        job = _Row()
        job.raws = (raw,)
        job.shapes = self._shapes
        job.deadline = exchange.arrived + self._served.deadline_s
        job.done = self._done
        job.caller = exchange.protocol
        job.exchange = exchange
        job.queued = parsed
        if request_id:
            job.request_id = request_id
        else:
            job.together = self._together
        try:
            if self._flights is not None:
                self._flights.board(key, job)
            else:
                self._run(job)
        except ParbakeError as error:
            self._fail(exchange, error)

    def _note(self, exchange: Exchange, key: bytes, where: int, raws: Sequence[bytes], record: bytes) -> None:
        recorder = self._recorder
        if self._note_key is not None:
            self._note_key(key)
        elif recorder is not None:
            recorder.note(
                key,
                where,
                perf_counter() - exchange.arrived,
                raws if recorder.wants_inputs else None,
                record if recorder.wants_outputs else None,
            )

    def _answer(self, exchange: Exchange, reply: bytes, parsed: float, key: bytes, record: bytes) -> None:
        """Send a reply from the table, in a row with the others of this turn of the loop.

        Writes in a row find the client awake; to wake it for each of them costs more than the answers do.
        """
        baked = self._baked
        baked.append((exchange, reply, parsed, key, record))
        if len(baked) >= _IN_A_ROW or exchange.protocol.alone:
            self._send_baked()
        elif len(baked) == 1:
            exchange.protocol.soon(self._send_baked)

    def _send_baked(self) -> None:
        baked, self._baked = self._baked, []
        answered = self._log
        begin = len(answered)
        note_key = self._note_key
        each = self._logs and not self._noting_turns and not self._keeps_inputs
        gone: list[Exchange] = []
        for exchange, reply, parsed, key, record in baked:
            try:
                exchange.protocol.send(exchange, reply)
            except Exception:
                # The others of this turn must get theirs.
                log().exception("reply.not_sent", deployment=self._served.name)
                exchange.protocol.abort()
                gone.append(exchange)
                continue
            arrived = exchange.arrived
            total_s = perf_counter() - arrived
            answered += (parsed - arrived, 0.0, 0.0, total_s, 1, 1)
            if note_key is not None:
                note_key(key)
            elif each:
                self._note(exchange, key, self._served.where_baked(key), (), record)
        if self._noting_turns and self._recorder is not None:
            if gone:
                baked = [item for item in baked if item[0] not in gone]
            # The times of all are in what was just counted.
            self._note_baked(self._recorder, [item[3] for item in baked], answered[begin + 3 :: 6])
        if len(answered) >= FOLD_AT:
            self._settle()

    def _note_baked(self, recorder: Recorder, keys: list[bytes], seconds: list[float]) -> None:
        if self._baked_in is not None:
            recorder.note_turn(self._baked_in, keys, seconds)
            return
        places = [self._served.where_baked(key) for key in keys]
        for place in set(places):
            here = [at for at, other in enumerate(places) if other == place]
            recorder.note_turn(place, [keys[at] for at in here], [seconds[at] for at in here])

    def _all_done(self, jobs: Sequence[Job], outcome: Outcome) -> None:
        """The model has answered a batch of such rows."""
        replies = self._write_rows(outcome.raws)
        if replies is None:
            raws = zip(*map(_rows_of, outcome.raws, [len(jobs)] * len(outcome.raws)), strict=True)
            replies = [self._write_row(b"".join(row), "") for row in raws]
        model_s = outcome.seconds
        log = self._log
        rows = cast("Sequence[_Row]", jobs)  # only rows have this callback
        turn = self._noting_turns
        if self._flights is not None or (self._logs and not turn):
            columns = [_rows_of(raw, len(jobs)) for raw in outcome.raws]
            for job, *out_raws in zip(rows, *columns, strict=True):
                job.out_raws, job.out_shapes = out_raws, outcome.shapes
                job.model_s = model_s
                record = self._served.landed(job)
                if not turn:
                    self._note(job.exchange, job.key or key_of(job.raws[0]), MODEL, job.raws, record)
        elif self._note_key is not None:
            for job in rows:
                self._note_key(key_of(job.raws[0]))
        seconds: list[float] = []
        for job, reply in zip(rows, replies, strict=True):
            exchange = job.exchange
            exchange.protocol.send(exchange, reply)
            arrived = exchange.arrived
            total_s = perf_counter() - arrived
            seconds.append(total_s)
            log += (job.queued - arrived, job.queue_s, model_s, total_s, 1, 0)
        if turn and self._recorder is not None:
            self._recorder.note_turn(MODEL, [job.key or key_of(job.raws[0]) for job in rows], seconds)
        self._settle()

    def _done(self, job: _Row) -> None:
        """The model has answered a row, or failed on it."""
        exchange = job.exchange
        if job.error is not None:
            if self._flights is not None:
                self._flights.failed(job, job.error)
            self._fail(exchange, job.error)
            return
        record = self._served.landed(job)
        if self._recorder is not None:
            self._note(
                exchange, job.key or key_of(job.raws[0]), JOINED if job.joined else MODEL, job.raws, record
            )
        try:
            reply = self._write_row(record, job.request_id)
        except Exception:
            self._failed_unexpectedly(exchange)
            return
        exchange.protocol.send(exchange, reply)
        arrived = exchange.arrived
        self._answered(job.queued - arrived, job.queue_s, job.model_s, perf_counter() - arrived, 1, 0)


class _Row(Job):
    """One row on its way through the model, and whom to answer. Whoever makes one sets the attributes of `Job`.

    The call of an ``__init__`` would be a twentieth of what the whole request costs.
    """

    rows = 1
    request_id = ""
    exchange: Exchange

    __init__ = object.__init__


def _rows_of(raw: bytes, rows: int) -> list[bytes]:
    size = len(raw) // rows
    return [raw[at : at + size] for at in range(0, rows * size, size)]


def endpoint(
    served: ServedVersion, codec: InferCodec, max_body_bytes: int, memo: ReplyMemo
) -> PredictionEndpoint:
    """The quickest endpoint that a version's contract allows."""
    if codec.has_short_way:
        return OneRowEndpoint(served, codec, max_body_bytes, memo)
    return PredictionEndpoint(served, codec, max_body_bytes)
