"""Rows in, predictions out: from the table, by the model, or by both, for one version of a deployment."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Literal

from parbake.contract.key import Keys
from parbake.contract.model import Contract
from parbake.contract.record import Records
from parbake.contract.rounding import round_inputs
from parbake.contract.tensors import from_raw, row_slices, to_raw
from parbake.errors import KeyNotBaked, ModelFailed, NotReady, ParbakeError
from parbake.runtime.batcher import Batcher, Caller, Job
from parbake.serving.model import Answer, Shape
from parbake.serving.ports import PredictionTable
from parbake.serving.stats import Stats

Mode = Literal["dynamic", "static", "hybrid"]
Done = Callable[[Answer | ParbakeError], None]


class ServedVersion:
    """One version of a deployment, as one front serves it.

    ``default`` is the record that static mode answers for keys that were never baked.
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
        self._default = default
        self._keys = Keys(contract)
        self._records = Records(contract)
        self.get: Callable[[bytes], bytes | None] | None = (
            table.get if table is not None and mode != "dynamic" else None
        )
        """Looks a key up in the table; None in dynamic mode."""
        self._shapes = tuple(spec.shape for spec in contract.inputs)
        # Static mode needs only what makes the key.
        self.needed = self._keys.inputs if mode == "static" else tuple(range(len(contract.inputs)))

    def expire(self) -> None:
        """From now on nothing in the table is fresh enough: hybrid mode asks the model, static mode knows no key."""
        self.expired = True
        if self.get is not None:
            self.get = _nothing

    @property
    def pending(self) -> bool:
        """Whether anything that was accepted has not been answered."""
        return self.batcher is not None and not self.batcher.idle

    @property
    def ready(self) -> bool:
        """Whether every request could be answered now."""
        if self.closed:
            return False
        return self.mode == "static" or (self.batcher is not None and self.batcher.up)

    def predict(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...] | None,
        deadline: float,
        done: Done,
        caller: Caller | None = None,
    ) -> Answer | None:
        """Answer ``rows`` rows. ``raws`` are each input's raw bytes in the contract's order, already validated.

        ``shapes`` are the row shapes (None: as the contract fixes them); ``deadline`` is on the clock of
        `time.perf_counter`. Where no model is needed the answer comes back at once; else None does, and
        ``done`` is called later with the answer or an error. No work is done for a ``caller``
        that has gone. Raises `ParbakeError` for what is refused now.
        """
        if self.closed:
            raise NotReady(f"model {self.name!r} version {self.version} was unloaded", retry_after_s=1.0)
        if self.contract.key.rounding:
            raws = self._rounded(raws, rows, shapes)
        get = self.get
        if get is None:
            self._submit(raws, rows, shapes, deadline, done, caller)
            return None
        keys = self._keys.of(raws, rows, shapes)
        if rows == 1:
            record = get(keys[0])
            if record is not None:
                out_raws, out_shapes = self._records.split(record)
                return Answer(out_raws, out_shapes, 1, 1)
            if self.mode == "static":
                out_raws, out_shapes = self._records.split(self._unknown(keys[0], 0))
                return Answer(out_raws, out_shapes, 1, 0)
            self._submit(raws, rows, shapes, deadline, done, caller)
            return None
        return self._many(raws, rows, shapes, deadline, done, caller, [get(key) for key in keys], keys)

    def _many(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...] | None,
        deadline: float,
        done: Done,
        caller: Caller | None,
        records: list[bytes | None],
        keys: list[bytes],
    ) -> Answer | None:
        """Put the baked rows and the model's rows together again in order."""
        misses = [i for i, record in enumerate(records) if record is None]
        if misses and self.mode == "static":
            for i in misses:
                records[i] = self._unknown(keys[i], i)
            return self._together(records, rows - len(misses))
        if not misses:
            return self._together(records, rows)
        if len(misses) == rows:
            self._submit(raws, rows, shapes, deadline, done, caller)
            return None
        parts: list[bytes] = []
        for spec, raw, shape in zip(self.contract.inputs, raws, shapes or self._shapes, strict=True):
            elements = 1
            for size in shape:
                elements *= size
            slices = row_slices(raw, spec.datatype, rows, elements)
            parts.append(b"".join([slices[i] for i in misses]))

        def merge(answer: Answer | ParbakeError) -> None:
            if isinstance(answer, ParbakeError):
                done(answer)
                return
            try:
                columns = [
                    row_slices(raw, spec.datatype, len(misses), _elements(shape))
                    for spec, raw, shape in zip(
                        self.contract.outputs, answer.raws, answer.shapes, strict=True
                    )
                ]
                for at, i in enumerate(misses):
                    records[i] = self._records.join([column[at] for column in columns], answer.shapes)
                whole = self._together(records, rows - len(misses))
            except ParbakeError as error:
                done(error)
                return
            except (ValueError, IndexError, struct.error) as error:
                done(ModelFailed(f"baked and computed rows do not fit together: {error}"))
                return
            whole.queue_s, whole.model_s = answer.queue_s, answer.model_s
            done(whole)

        self._submit(parts, len(misses), shapes, deadline, merge, caller)
        return None

    def _submit(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...] | None,
        deadline: float,
        done: Done,
        caller: Caller | None,
    ) -> None:
        if self.batcher is None:
            raise NotReady(f"model {self.name!r} is not loaded", retry_after_s=1.0)

        def finished(job: Job) -> None:
            if job.error is not None:
                done(job.error)
            else:
                done(Answer(job.out_raws, job.out_shapes, rows, 0, job.queue_s, job.model_s))

        self.batcher.submit(Job(raws, rows, shapes or self._shapes, deadline, finished, caller))

    def _together(self, records: Sequence[bytes | None], baked_rows: int) -> Answer:
        columns: list[list[bytes]] = [[] for _ in self.contract.outputs]
        shapes: tuple[Shape, ...] | None = None
        for record in records:
            if record is None:
                raise ValueError("a row has neither a record nor an answer of the model")
            raws, row_shapes = self._records.split(record)
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
            f"{self.name!r}, which has {self.table.rows if self.table else 0} keys",
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


def _nothing(_: bytes) -> bytes | None:
    """What an expired table holds."""
    return None


def _elements(shape: Shape) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return elements
