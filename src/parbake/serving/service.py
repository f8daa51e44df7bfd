"""Rows in, predictions out: from the table, by the model, or by both, for one version of a deployment."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Literal

from parbake.contract.key import Keys
from parbake.contract.model import Contract
from parbake.contract.record import Records
from parbake.contract.rounding import round_inputs
from parbake.contract.tensors import Shape, from_raw, row_slices, to_raw
from parbake.contract.where import DEFAULT, FALLBACK, HEAD, JOINED, MODEL, TABLE
from parbake.errors import KeyNotBaked, ModelFailed, NotReady, ParbakeError
from parbake.logs import log
from parbake.runtime.batcher import Batcher, Caller, Job
from parbake.runtime.waiting import NORMAL
from parbake.serving.fallback import Asked, Fallback
from parbake.serving.flights import Flights
from parbake.serving.head import Get, Head, Row
from parbake.serving.model import Answer
from parbake.serving.ports import PredictionTable, Recorder
from parbake.serving.stats import Stats

Mode = Literal["dynamic", "static", "hybrid"]
Done = Callable[[Answer | ParbakeError], None]


def patient(caller: Caller | None) -> bool:
    """Whether nobody waits for the answer: what passes before the model begins says nothing about the version."""
    return getattr(caller, "patience_s", 0.0) > 0


class ServedVersion:
    """One version of a deployment, as one front serves it.

    ``default`` is the record that static mode answers for keys that were never baked. ``head`` is what hybrid mode
    learns to keep baked; ``recorder`` takes a note of each row.
    """

    def __init__(
        self,
        name: str,
        version: str,
        contract: Contract,
        digest: str,
        *,
        mode: Mode,
        table: PredictionTable | None,
        batcher: Batcher | None,
        deadline_s: float,
        stats: Stats,
        default: bytes | None = None,
        head: Head | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.contract = contract
        self.digest = digest
        self.mode = mode
        self.table = table
        self.batcher = batcher
        self.deadline_s = deadline_s
        self.stats = stats
        self.closed = False
        self.expired = False
        self.changes = 0
        """Grows whenever it answers from something else than before: who has looked that up looks again."""
        self._default = default
        self.head = head
        self.recorder = recorder
        self.fallback: Fallback | None = None
        """What answers where the model cannot."""
        self.keys = Keys(contract)
        self.records = Records(contract)
        self._row_keys = Keys(contract, whole_row=True) if contract.key.columns and head is not None else None
        """What the learned head goes by where the contract's key is an entity: an answer that was computed for
        one row is no other's, as long as features may have changed in between."""
        self._table_get: Get | None = table.get if table is not None and mode != "dynamic" else None
        self.get: Get | None = self._table_get
        """Looks a key up in table and head; None in dynamic mode."""
        if head is not None:
            if self._row_keys is None:
                head.below = self._table_get
            self.get = head.get
        self.flights: Flights | None = (
            Flights(batcher.submit) if head is not None and batcher is not None else None
        )
        """Where identical rows under way are kept, to compute them once."""
        self._shapes = tuple(spec.shape for spec in contract.inputs)
        # Static mode needs only what makes the key.
        self.needed = self.keys.inputs if mode == "static" else tuple(range(len(contract.inputs)))

    def expire(self) -> None:
        """From now on nothing in the table is fresh enough: hybrid mode asks the model, static mode knows no key."""
        self.expired = True
        self.changes += 1
        if self._table_get is not None:
            self._table_get = _nothing
        if self.head is not None:
            self.head.below = None
        elif self.get is not None:
            self.get = _nothing

    def lose_table(self) -> None:
        """From now on there is no table: hybrid mode asks the model, static mode cannot answer."""
        table, self.table = self.table, None
        self.changes += 1
        self._table_get = None
        if self.head is not None:
            self.head.below = None
        elif self.get is not None:
            self.get = _nothing
        if table is not None:
            table.close()

    def refused(self, code: str, arrived: float) -> None:
        """Count a request that came at ``arrived`` and was answered with an error."""
        self.stats.refused(code)
        if self.recorder is not None:
            self.recorder.refused(code, perf_counter() - arrived)

    def rescued(self, asked: Asked, code: str) -> None:
        """Count and note a request that was answered in the model's place; ``code`` says what was wrong."""
        self.stats.rescued(code)
        if self.recorder is not None:
            keys = self.keys_of(asked)
            request = _Request(
                asked.raws, asked.rows, asked.shapes, asked.arrived, asked.priority, asked.client
            )
            request.keys, request.where = keys, [FALLBACK] * asked.rows
            self._note(request, None)

    def keys_of(self, asked: Asked) -> list[bytes]:
        """The keys of the rows, rounded where the contract says so."""
        raws = asked.raws
        if self.contract.key.rounding:
            raws = self._rounded(raws, asked.rows, asked.shapes)
        return self.keys.of(raws, asked.rows, asked.shapes)

    @property
    def pending(self) -> bool:
        """Whether anything that was accepted has not been answered."""
        return self.batcher is not None and not self.batcher.idle

    @property
    def ready(self) -> bool:
        """Whether every request could be answered now."""
        if self.closed:
            return False
        if self.mode == "static":
            return self.table is not None
        return self.batcher is not None and self.batcher.answers

    def predict(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...] | None,
        deadline: float,
        done: Done,
        caller: Caller | None = None,
        arrived: float = 0.0,
        priority: int = NORMAL,
        client: str = "",
    ) -> Answer | None:
        """Answer ``rows`` rows. ``raws`` are each input's raw bytes in the contract's order, already validated.

        ``shapes`` are the row shapes (None: as the contract fixes them); ``deadline`` and ``arrived`` (when the
        request came; 0 for now) are on the clock of `time.perf_counter`. Where no model is needed the answer comes
        back at once; else None does, and ``done`` is called later with the answer or an error. No work is done for
        a ``caller`` that has gone; ``priority`` and ``client`` say who goes first where not all can (see
        `parbake.runtime.waiting`). Raises `ParbakeError` for what is refused now.
        """
        if self.fallback is None:
            return self.predict_itself(raws, rows, shapes, deadline, done, caller, arrived, priority, client)
        asked = Asked(
            raws, rows, shapes or self._shapes, deadline, caller, arrived or perf_counter(), priority, client
        )
        return self.fallback.over(self, asked, done)

    def predict_itself(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...] | None,
        deadline: float,
        done: Done,
        caller: Caller | None = None,
        arrived: float = 0.0,
        priority: int = NORMAL,
        client: str = "",
    ) -> Answer | None:
        """As `predict`, without a fallback."""
        if self.closed:
            raise NotReady(f"model {self.name!r} version {self.version} was unloaded", retry_after_s=1.0)
        if self.contract.key.rounding:
            raws = self._rounded(raws, rows, shapes)
        if self.get is None and self.recorder is None:
            self._submit(raws, rows, shapes, deadline, done, caller, priority, client)
            return None
        request = _Request(raws, rows, shapes or self._shapes, arrived or perf_counter(), priority, client)
        keys = request.keys = request.head_keys = self.keys.of(raws, rows, shapes)
        get, table_get = self.get, self._table_get
        if get is None:
            request.where = [MODEL] * rows
            self._submit(raws, rows, shapes, deadline, self._noting(request, done), caller, priority, client)
            return None
        if self._row_keys is None:
            records = [get(key) for key in keys]
        else:
            # Table by entity, head by row.
            request.head_keys = self._row_keys.of(raws, rows, shapes)
            records = [get(key) for key in request.head_keys]
            if table_get is not None:
                records = [
                    table_get(key) if record is None else record
                    for key, record in zip(keys, records, strict=True)
                ]
        misses = [i for i, record in enumerate(records) if record is None]
        if misses and self.mode == "static":
            for i in misses:
                records[i] = self._unknown(keys[i], i)
        elif misses:
            self._ask(request, misses, records, deadline, done, caller)
            return None
        answer = self.together(records, rows if self.mode != "static" else rows - len(misses))
        if self.recorder is not None:
            request.where = [self.where_baked(key) for key in request.head_keys]
            for i in misses:
                request.where[i] = DEFAULT
            self._note(request, records)
        return answer

    def head_key(self, row: Row) -> bytes:
        """The key that the learned head has for a row."""
        return (self._row_keys or self.keys).of(row.raws, 1, row.shapes)[0]

    def first_key(self, raws: Sequence[bytes], shapes: tuple[Shape, ...]) -> bytes:
        """The key of one row, as the contract makes it."""
        return self.keys.of(self.rounded(raws, 1, shapes), 1, shapes)[0]

    def rounded(self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...]) -> Sequence[bytes]:
        """The inputs as keys and model see them."""
        return self._rounded(raws, rows, shapes) if self.contract.key.rounding else raws

    def baked(self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...]) -> Answer | None:
        """The answer to rounded rows without the model, or None where one has to be asked. Raises `ParbakeError`."""
        get = self._table_get if self._row_keys is not None else self.get
        if get is None:
            return None
        keys = self.keys.of(raws, rows, shapes)
        records = [get(key) for key in keys]
        if self.mode == "static":
            known = [
                self._unknown(keys[i], i) if record is None else record for i, record in enumerate(records)
            ]
            return self.together(known, rows)
        return None if None in records else self.together(records, rows)

    def where_baked(self, key: bytes) -> int:
        """The code of where a baked row was answered."""
        if self.head is None:
            return TABLE
        return HEAD if self._table_get is None or self.head.holds(key) else TABLE

    def landed(self, job: Job) -> bytes:
        """Keep what the model computed for a row, answer those who waited for the same; gives the record."""
        record = self.records.join(job.out_raws, job.out_shapes)
        if self.head is not None and self.flights is not None and job.key:
            others = self.flights.landed(job)
            self.head.store(job.key, Row(tuple(job.raws), job.shapes), record)
            for other in others:
                self.head.asked(job.key)
                other.joined = True
                other.out_raws, other.out_shapes = job.out_raws, job.out_shapes
                other.queue_s, other.model_s = job.queue_s, job.model_s
                try:
                    other.done(other)
                except Exception:
                    log().exception("flight.answer_not_taken", deployment=self.name)
        return record

    def _ask(
        self,
        request: _Request,
        misses: list[int],
        records: list[bytes | None],
        deadline: float,
        done: Done,
        caller: Caller | None,
    ) -> None:
        """Have the model compute the rows without a record, and put baked and computed together in order."""
        rows = request.rows
        if self.recorder is not None:
            request.where = [MODEL if record is None else TABLE for record in records]
            for i, record in enumerate(records):
                if record is not None:
                    request.where[i] = self.where_baked(request.head_keys[i])
        if rows == 1 and self.flights is not None:
            self._ask_one(self.flights, request, deadline, done, caller)
            return
        if len(misses) == rows and self.head is None:
            noted = self._noting(request, done)
            self._submit(
                request.raws, rows, request.shapes, deadline, noted, caller, request.priority, request.client
            )
            return
        raws = self._parts(request, misses)
        computed = [b"".join(column) for column in raws]

        def merge(answer: Answer | ParbakeError) -> None:
            if isinstance(answer, ParbakeError):
                done(answer)
                return
            try:
                columns = [
                    row_slices(raw, spec.datatype, len(misses), math.prod(shape))
                    for spec, raw, shape in zip(
                        self.contract.outputs, answer.raws, answer.shapes, strict=True
                    )
                ]
                for at, i in enumerate(misses):
                    record = self.records.join([column[at] for column in columns], answer.shapes)
                    records[i] = record
                    if self.head is not None:
                        row = Row(tuple(column[at] for column in raws), request.shapes)
                        self.head.store(request.head_keys[i], row, record)
                whole = self.together(records, rows - len(misses))
            except ParbakeError as error:
                done(error)
                return
            except (ValueError, IndexError, struct.error) as error:
                done(ModelFailed(f"baked and computed rows do not fit together: {error}"))
                return
            whole.queue_s, whole.model_s = answer.queue_s, answer.model_s
            done(whole)
            if self.recorder is not None:
                self._note(request, records)

        self._submit(
            computed, len(misses), request.shapes, deadline, merge, caller, request.priority, request.client
        )

    def _ask_one(
        self, flights: Flights, request: _Request, deadline: float, done: Done, caller: Caller | None
    ) -> None:
        """One row that is not baked: together with those who ask for the same at the moment."""
        key = request.head_keys[0]

        def finished(job: Job) -> None:
            if job.error is not None:
                flights.failed(job, job.error)
                done(job.error)
                return
            record = self.landed(job)
            done(Answer(job.out_raws, job.out_shapes, 1, 0, job.queue_s, job.model_s))
            if self.recorder is not None:
                request.where = [JOINED if job.joined else MODEL]
                self._note(request, [record])

        job = Job(request.raws, 1, request.shapes, deadline, finished, caller)
        job.belongs(request.client, request.priority)
        flights.board(key, job)

    def _parts(self, request: _Request, rows: Sequence[int]) -> list[list[bytes]]:
        """Per input the raw bytes of some rows of a request."""
        parts: list[list[bytes]] = []
        for spec, raw, shape in zip(self.contract.inputs, request.raws, request.shapes, strict=True):
            # An input that is not needed may have been left out.
            slices = (
                row_slices(raw, spec.datatype, request.rows, math.prod(shape))
                if raw
                else [b""] * request.rows
            )
            parts.append([slices[i] for i in rows])
        return parts

    def _noting(self, request: _Request, done: Done) -> Done:
        """``done`` with a note for each row after it, where somebody takes notes."""
        if self.recorder is None:
            return done

        def noted(answer: Answer | ParbakeError) -> None:
            done(answer)
            if not isinstance(answer, ParbakeError):
                self._note(request, self.records_of(answer) if self._notes_outputs else None)

        return noted

    @property
    def _notes_outputs(self) -> bool:
        return self.recorder is not None and self.recorder.wants_outputs

    def records_of(self, answer: Answer) -> list[bytes]:
        """The record of each row of an answer."""
        columns = [
            row_slices(raw, spec.datatype, answer.rows, math.prod(shape))
            for spec, raw, shape in zip(self.contract.outputs, answer.raws, answer.shapes, strict=True)
        ]
        return [self.records.join(row, answer.shapes) for row in zip(*columns, strict=True)]

    def _note(self, request: _Request, records: Sequence[bytes | None] | None) -> None:
        """Have each row of a request noted."""
        recorder = self.recorder
        if recorder is None:
            return
        if recorder.note_key is not None:
            for key in request.keys:
                recorder.note_key(key)
            return
        seconds = perf_counter() - request.arrived
        columns = self._parts(request, range(request.rows)) if recorder.wants_inputs else None
        for i, (key, where) in enumerate(zip(request.keys, request.where, strict=True)):
            recorder.note(
                key,
                where,
                seconds,
                None if columns is None else [column[i] for column in columns],
                records[i] if records is not None and recorder.wants_outputs else None,
            )

    def _submit(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...] | None,
        deadline: float,
        done: Done,
        caller: Caller | None,
        priority: int,
        client: str,
    ) -> None:
        if self.batcher is None:
            raise NotReady(f"model {self.name!r} is not loaded", retry_after_s=1.0)
        if rows > 1 and patient(caller):
            # It may wait as long as it likes. Its batch may not: others stand behind it.
            self.batcher.check_alone(rows, self.deadline_s)

        def finished(job: Job) -> None:
            if job.error is not None:
                done(job.error)
            else:
                done(Answer(job.out_raws, job.out_shapes, rows, 0, job.queue_s, job.model_s))

        job = Job(raws, rows, shapes or self._shapes, deadline, finished, caller)
        job.belongs(client, priority)
        self.batcher.submit(job)

    def together(self, records: Sequence[bytes | None], baked_rows: int) -> Answer:
        """The answer that so many records make. Raises `ModelFailed` where their shapes differ."""
        columns: list[list[bytes]] = [[] for _ in self.contract.outputs]
        shapes: tuple[Shape, ...] | None = None
        for record in records:
            if record is None:
                raise ValueError("a row has neither a record nor an answer of the model")
            raws, row_shapes = self.records.split(record)
            if shapes is not None and shapes != row_shapes:
                raise ModelFailed(
                    f"rows of one request have outputs of different shapes: {shapes} and {row_shapes}",
                    hint="ask for them in separate requests",
                )
            shapes = row_shapes
            for column, raw in zip(columns, raws, strict=True):
                column.append(raw)
        return Answer([b"".join(column) for column in columns], shapes or (), len(records), baked_rows)

    def _unknown(self, key: bytes, row: int) -> bytes:
        if self.table is None:
            raise NotReady(
                f"the prediction table of {self.name!r} was changed where it lies, and is not used any more",
                hint="bake the table again, or copy it there again; then parbake reload",
                retry_after_s=60.0,
            )
        if self._default is not None:
            return self._default
        if self.expired:
            raise KeyNotBaked(
                f"the prediction table of {self.name!r} is older than the {self.contract.freshness_s:g} s for which "
                "its contract lets a prediction hold",
                hint="bake again and parbake reload, or serve in hybrid mode",
            )
        made_of = ", ".join(self.contract.key.columns) or "the whole row"
        raise KeyNotBaked(
            f"row {row} (key {key.hex()[:12]}..., made of {made_of}) is not in the prediction table of "
            f"{self.name!r}, which has {self.table.rows} keys",
            hint="bake it, serve in hybrid mode, or pack with a default",
        )

    def _rounded(self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...] | None) -> list[bytes]:
        inputs = {
            spec.name: from_raw(raw, spec.datatype, (rows, *shape))
            for spec, raw, shape in zip(self.contract.inputs, raws, shapes or self._shapes, strict=True)
            if raw or not spec.elements
        }
        rounded = round_inputs(self.contract, inputs)
        return [
            to_raw(rounded[spec.name], spec.datatype) if spec.name in rounded else raw
            for spec, raw in zip(self.contract.inputs, raws, strict=True)
        ]


class _Request:
    """The rows of one request while they are being answered."""

    __slots__ = ("arrived", "client", "head_keys", "keys", "priority", "raws", "rows", "shapes", "where")

    def __init__(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...],
        arrived: float,
        priority: int,
        client: str,
    ) -> None:
        self.priority = priority
        self.client = client
        self.raws = raws
        self.rows = rows
        self.shapes = shapes
        self.arrived = arrived
        self.keys: list[bytes] = []
        """Keys of the rows, as the contract makes them."""
        self.head_keys: list[bytes] = []
        """The keys that the learned head has for them."""
        self.where: list[int] = []


def _nothing(_: bytes) -> bytes | None:
    """What an expired table holds."""
    return None
