"""The short way for what most callers send: one row of one matrix of numbers, as plain JSON.

Nothing is left out on it: the body is decoded with types; name, datatype, shape and number of values are held
against the contract; the deadline is kept; everything is counted. Whatever does not fit goes the general way,
which answers it or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
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
        self._together_binary = self._all_done_binary
        self._last_binary = b""
        self._binary = codec.binary
        self._is_row = codec.binary_row
        self._learn_binary = codec.learn_binary
        self._head = head = served.head
        alone = head is not None and head.below is None
        self._get = head.find if head is not None and alone else served.get
        self._asked: Callable[[list[bytes]], None] | None = (
            head.all_asked if head is not None and alone else None
        )
        """Notes the keys that a head answered, those of a turn in one go; None where looking them up does so."""
        self._flights = served.flights
        self._recorder = served.recorder
        self._note_key = served.recorder.note_key if served.recorder is not None else None
        self._note_keys = served.recorder.note_keys if served.recorder is not None else None
        self._baked_in = (
            None if served.head is not None and served.table is not None else served.where_baked(b"")
        )
        """Where all baked rows are answered; None where there are two places."""
        self._lasts = served.head is None
        """Whether a baked row stays as it is for as long as this endpoint: a published table never changes, and when
        it expires or is lost there is another endpoint (`ServedVersion.changes`)."""
        self._keeps_inputs = served.recorder is not None and served.recorder.wants_inputs
        self._keeps_outputs = served.recorder is not None and served.recorder.wants_outputs
        self._batcher = served.batcher if served.mode != "static" else None
        self._memo = memo
        self._replies = memo.shelf()
        """Of bodies that the table answered."""
        self._baked: list[tuple[Exchange, bytes, float, bytes, bytes, bytes]] = []
        """Replies of this turn of the loop, when their requests had been read, keys, records and rows."""
        self._shapes = (served.contract.inputs[0].shape,)

    def forget(self) -> None:
        """See `PredictionEndpoint`."""
        self._memo.remove(self._replies)

    def answer(self, exchange: Exchange) -> None:
        """Handle one request; the reply is written now or later."""
        if not (exchange.head.plain and exchange.keep_alive):
            if exchange.head.json_bytes and exchange.keep_alive:
                self._answer_binary(exchange, exchange.head.json_bytes)
            else:
                super().answer(exchange)
            return
        body = exchange.body
        get = self._get
        if get is not None:
            known = self._replies.get(body)
            if known is not None:
                # A head is asked every time; only reading the body and writing the reply are spared.
                key, baked, reply, raw = known
                if self._lasts or get(key) == baked:
                    self._answer(exchange, reply, perf_counter(), key, baked, raw)
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
                self._answer(exchange, reply, parsed, key, record, raw)
                if not request_id:
                    kept = raw if self._keeps_inputs else b""
                    if self._head is not None:
                        key = self._head.own(key)
                    self._memo.offer(self._replies, body, (key, record, reply, kept))
                return
        self._compute(exchange, raw, key, parsed, request_id, b"")

    def _answer_binary(self, exchange: Exchange, json_bytes: int) -> None:
        """The short way for raw bytes behind JSON that has been here before."""
        body = exchange.body
        head, raw = body[:json_bytes], body[json_bytes:]
        known = self._binary.get(head)
        if known is None or not self._is_row(raw):
            # Learned when it comes twice in a row: where each has its own id, each would be read twice.
            if head == self._last_binary and self._is_row(raw):
                with suppress(ParbakeError):
                    # The long way says what is wrong.
                    self._learn_binary(head, self._codec.read(body, json_bytes))
            self._last_binary = head
            super().answer(exchange)
            return
        start, request_id = known
        parsed = perf_counter()
        key = b""
        if self._get is not None:
            key = key_of(raw)
            record = self._get(key)
            if record is not None:
                reply = start + record if start else self._write_row(record, request_id)
                self._answer(exchange, reply, parsed, key, record, raw)
                return
        self._compute(exchange, raw, key, parsed, request_id, start)

    def _compute(
        self, exchange: Exchange, raw: bytes, key: bytes, parsed: float, request_id: str, start: bytes
    ) -> None:
        """Have the model answer a row. ``start``: what the reply begins with where it is binary."""
        batcher = self._batcher
        if batcher is None or self._served.closed:
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
        if start:
            job.start = start
            job.together = self._together_binary
        elif request_id:
            job.request_id = request_id
        else:
            job.together = self._together
        holder = exchange.head.holder
        try:
            if holder is not None:
                job.belongs(holder.name)
            if self._flights is not None:
                self._flights.board(key, job)
            elif not job.plain:
                batcher.submit(job)
            elif batcher.arriving:
                batcher.arriving.append(job)
            elif exchange.protocol.alone:
                batcher.submit_at_once(job)
            else:
                batcher.expect()
                batcher.arriving.append(job)
        except ParbakeError as error:
            self._rescue(exchange, error)

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

    def _answer(
        self, exchange: Exchange, reply: bytes, parsed: float, key: bytes, record: bytes, raw: bytes
    ) -> None:
        """Send a reply from the table, in a row with the others of this turn of the loop.

        Writes in a row find the client awake; to wake it for each of them costs more than the answers do.
        """
        baked = self._baked
        baked.append((exchange, reply, parsed, key, record, raw))
        if len(baked) >= _IN_A_ROW or exchange.protocol.alone:
            self._send_baked()
        elif len(baked) == 1:
            exchange.protocol.soon(self._send_baked)

    def _send_baked(self) -> None:
        baked, self._baked = self._baked, []
        answered = self._log
        seconds: list[float] = []
        gone: list[Exchange] = []
        for exchange, reply, parsed, _, _, _ in baked:
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
            seconds.append(total_s)
            answered += (parsed - arrived, 0.0, 0.0, total_s, 1, 1)
        if gone:
            baked = [item for item in baked if item[0] not in gone]
        keys = [item[3] for item in baked]
        if self._asked is not None:
            self._asked(keys)
        if self._note_keys is not None:
            self._note_keys(keys)
        elif self._recorder is not None:
            self._note_baked(self._recorder, baked, keys, seconds)
        if len(answered) >= FOLD_AT:
            self._settle()

    def _note_baked(
        self,
        recorder: Recorder,
        baked: list[tuple[Exchange, bytes, float, bytes, bytes, bytes]],
        keys: list[bytes],
        seconds: list[float],
    ) -> None:
        records = [item[4] for item in baked] if self._keeps_outputs else None
        raws = [(item[5],) for item in baked] if self._keeps_inputs else None
        if self._baked_in is not None:
            recorder.note_turn(self._baked_in, keys, seconds, raws, records)
            return
        places = [self._served.where_baked(key) for key in keys]
        for place in set(places):
            here = [at for at, other in enumerate(places) if other == place]
            recorder.note_turn(
                place,
                [keys[at] for at in here],
                [seconds[at] for at in here],
                None if raws is None else [raws[at] for at in here],
                None if records is None else [records[at] for at in here],
            )

    def _all_done(self, jobs: Sequence[Job], outcome: Outcome) -> None:
        """The model has answered a batch of such rows."""
        replies = self._write_rows(outcome.raws)
        if replies is None:
            replies = [self._write_row(record, "") for record in _records_of(outcome, len(jobs))]
        self._reply_all(jobs, replies, outcome)

    def _all_done_binary(self, jobs: Sequence[Job], outcome: Outcome) -> None:
        """The same where the replies are binary."""
        rows = cast("Sequence[_Row]", jobs)  # only rows have this callback
        records = _records_of(outcome, len(jobs))
        self._reply_all(
            jobs, [job.start + record for job, record in zip(rows, records, strict=True)], outcome
        )

    def _reply_all(self, jobs: Sequence[Job], replies: Sequence[bytes], outcome: Outcome) -> None:
        model_s = outcome.seconds
        log = self._log
        rows = cast("Sequence[_Row]", jobs)  # only rows have this callback
        records: list[bytes] | None = None
        if self._flights is not None:
            columns = [_rows_of(raw, len(jobs)) for raw in outcome.raws]
            records = []
            for job, *out_raws in zip(rows, *columns, strict=True):
                job.out_raws, job.out_shapes = out_raws, outcome.shapes
                job.model_s = model_s
                records.append(self._served.landed(job))
        elif self._keeps_outputs:
            records = _records_of(outcome, len(jobs))
        seconds: list[float] = []
        for job, reply in zip(rows, replies, strict=True):
            exchange = job.exchange
            exchange.protocol.send(exchange, reply)
            arrived = exchange.arrived
            total_s = perf_counter() - arrived
            seconds.append(total_s)
            log += (job.queued - arrived, job.queue_s, model_s, total_s, 1, 0)
        if self._note_key is not None:
            for job in rows:
                self._note_key(job.key or key_of(job.raws[0]))
        elif self._recorder is not None:
            self._recorder.note_turn(
                MODEL,
                [job.key or key_of(job.raws[0]) for job in rows],
                seconds,
                [job.raws for job in rows] if self._keeps_inputs else None,
                records if self._keeps_outputs else None,
            )
        self._settle()

    def _done(self, job: _Row) -> None:
        """The model has answered a row, or failed on it."""
        exchange = job.exchange
        if job.error is not None:
            if self._flights is not None:
                self._flights.failed(job, job.error)
            self._rescue(exchange, job.error)
            return
        record = self._served.landed(job)
        if self._recorder is not None:
            self._note(
                exchange, job.key or key_of(job.raws[0]), JOINED if job.joined else MODEL, job.raws, record
            )
        try:
            reply = job.start + record if job.start else self._write_row(record, job.request_id)
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
    start = b""
    exchange: Exchange

    __init__ = object.__init__


def _records_of(outcome: Outcome, rows: int) -> list[bytes]:
    columns = [_rows_of(raw, rows) for raw in outcome.raws]
    return columns[0] if len(columns) == 1 else [b"".join(row) for row in zip(*columns, strict=True)]


def _rows_of(raw: bytes, rows: int) -> list[bytes]:
    size = len(raw) // rows
    return [raw[at : at + size] for at in range(0, rows * size, size)]


def endpoint(
    served: ServedVersion, codec: InferCodec, max_body_bytes: int, memo: ReplyMemo
) -> PredictionEndpoint:
    """The quickest endpoint that a version's contract allows."""
    if codec.has_short_way and not (served.fallback is not None and served.fallback.keeps):
        return OneRowEndpoint(served, codec, max_body_bytes, memo)
    return PredictionEndpoint(served, codec, max_body_bytes)
