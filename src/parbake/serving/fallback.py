"""What answers where the model cannot: the contract's default, the last answer for the same key, or another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final

from parbake.contract.tensors import Shape
from parbake.errors import ModelFailed, ParbakeError, RowQuarantined, Unavailable
from parbake.runtime.batcher import Caller
from parbake.serving.model import Answer

if TYPE_CHECKING:
    from parbake.serving.service import Done, ServedVersion

RESCUED: Final = (Unavailable, ModelFailed, RowQuarantined)
"""Errors in place of which the fallback answers. What is wrong with the request itself is not among them."""

_MOST_ROWS: Final = 100_000
_MOST_BYTES: Final = 64 * 1024 * 1024
_SHARE: Final = 0.1
"""Part of the deadline that another model gets at least, however late it is."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as `ServedVersion.predict` takes it."""

    raws: Sequence[bytes]
    rows: int
    shapes: tuple[Shape, ...]
    deadline: float
    caller: Caller | None
    arrived: float
    priority: int
    client: str


class LastAnswers:
    """The last record of each key, within a budget; those that were noted first are forgotten first."""

    def __init__(self, most_rows: int = _MOST_ROWS, most_bytes: int = _MOST_BYTES) -> None:
        self._most_rows = most_rows
        self._most_bytes = most_bytes
        self._records: dict[bytes, bytes] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: bytes) -> bytes | None:
        """The last record of a key, if it is still known."""
        return self._records.get(key)

    def keep(self, key: bytes, record: bytes) -> None:
        """Note the record of a key."""
        before = self._records.pop(key, None)
        if before is not None:
            self.bytes -= len(key) + len(before)
        self._records[key] = record
        self.bytes += len(key) + len(record)
        while len(self._records) > self._most_rows or self.bytes > self._most_bytes:
            oldest = next(iter(self._records))
            self.bytes -= len(oldest) + len(self._records.pop(oldest))


class Fallback:
    """Answers for one served version where its model cannot.

    One of three kinds: ``default`` (a record), ``last`` (what was answered before), ``other`` (finds the version that
    is asked instead). ``name`` is what callers are told.
    """

    def __init__(
        self,
        name: str,
        *,
        default: bytes | None = None,
        last: LastAnswers | None = None,
        other: Callable[[], ServedVersion] | None = None,
    ) -> None:
        self.name = name
        self._default = default
        self._last = last
        self._other = other

    @property
    def keeps(self) -> bool:
        """Whether it has to see each answer."""
        return self._last is not None

    def over(self, served: ServedVersion, asked: Asked, done: Done) -> Answer | None:
        """Have a version answer, and step in where it cannot. As `ServedVersion.predict`."""

        def finished(result: Answer | ParbakeError) -> None:
            if isinstance(result, Answer):
                self._keep(served, asked, result)
                done(result)
                return
            if not isinstance(result, RESCUED):
                done(result)
                return
            try:
                answer = self.instead(served, asked, result, done)
            except ParbakeError as error:
                done(error)
                return
            if answer is not None:
                done(answer)

        try:
            answer = served.predict_itself(
                asked.raws,
                asked.rows,
                asked.shapes,
                asked.deadline,
                finished,
                asked.caller,
                asked.arrived,
                asked.priority,
                asked.client,
            )
        except RESCUED as error:
            return self.instead(served, asked, error, done)
        if answer is not None:
            self._keep(served, asked, answer)
        return answer

    def instead(self, served: ServedVersion, asked: Asked, error: ParbakeError, done: Done) -> Answer | None:
        """The answer in place of an error, at once, or later by ``done``. Raises the error where there is none."""
        if self._default is not None:
            return self._marked(served, asked, served.together([self._default] * asked.rows, 0), error)
        if self._last is not None:
            records = [self._last.get(key) for key in served.keys_of(asked)]
            if any(record is None for record in records):
                raise error
            return self._marked(served, asked, served.together(records, 0), error)
        if self._other is None:
            raise error

        def finished(result: Answer | ParbakeError) -> None:
            # That another could not either is not what the caller has to know.
            done(error if isinstance(result, ParbakeError) else self._marked(served, asked, result, error))

        late = perf_counter() + _SHARE * served.deadline_s
        try:
            answer = self._other().predict_itself(
                asked.raws,
                asked.rows,
                asked.shapes,
                max(asked.deadline, late),
                finished,
                asked.caller,
                asked.arrived,
                asked.priority,
                asked.client,
            )
        except ParbakeError:
            raise error from None
        return None if answer is None else self._marked(served, asked, answer, error)

    def _keep(self, served: ServedVersion, asked: Asked, answer: Answer) -> None:
        if self._last is None:
            return
        keys = served.keys_of(asked)
        for key, record in zip(keys, served.records_of(answer), strict=True):
            self._last.keep(key, record)

    def _marked(self, served: ServedVersion, asked: Asked, answer: Answer, error: ParbakeError) -> Answer:
        answer.fallback = self.name
        answer.baked_rows = 0
        served.rescued(asked, error.code)
        return answer
