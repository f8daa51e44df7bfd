"""The ring between the hot path and the background: rows go in for next to nothing, and are taken out in bulk.

One recorder belongs to one served version in one front. The event loop's thread adds, one background thread
drains; nothing is locked. A row is six items in a flat list, so that a full ring gives the garbage collector
no objects to walk: ``key, where, seconds, raws, record, time``. For `REFUSED` the code stands in place of raws.
Rows that are answered together are noted together: their keys, and how long
each took, as one piece of bytes, the rest as it is.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from time import time
from typing import Any, Final, TypeAlias

import numpy as np

from parbake.contract.key import KEY_BYTES
from parbake.contract.where import REFUSED

WIDTH: Final = 6
"""Items of one row."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows taken out of a recorder, by columns: first those that were noted one by one."""

    joined: bytes
    """All keys, one after another."""
    single: list[bytes]
    """Keys of those that were noted one by one; empty where a request was refused before it had a key."""
    where: bytes
    """A code of `parbake.contract.where` each."""
    seconds: array[float]
    extras: list[Sequence[bytes] | str | None]
    """The raw bytes of each input, or the code of the error where the row was refused, or None."""
    records: list[bytes | None]
    times: array[float]
    """Unix time in seconds."""

    def keys(self) -> list[bytes]:
        """The keys in a list, which takes longer than `joined`."""
        rest = range(sum(map(len, self.single)), len(self.joined), KEY_BYTES)
        return [*self.single, *(self.joined[at : at + KEY_BYTES] for at in rest)]

    def __len__(self) -> int:
        return len(self.where)


class Recorder:
    """Takes down what one served version answered. Never blocks and never raises; a full ring counts `dropped`.

    ``limit`` is the number of items that the ring may hold (rows times `WIDTH`); ``bytes_limit`` bounds the
    inputs and outputs that wait in it. Callers give None for what `wants_inputs` and `wants_outputs` do not ask.
    """

    __slots__ = (
        "_drained", "_late", "_late_from", "_noted", "_turns", "bytes_limit", "deployment", "digest", "dropped", "keys",
        "limit", "mode", "note_key", "note_keys", "rows", "version", "waiting", "wants_inputs", "wants_outputs",
    )  # fmt: skip

    def __init__(
        self,
        deployment: str,
        version: str,
        mode: str,
        digest: str,
        *,
        rows: int = 128 * 1024,
        bytes_limit: int = 64 * 1024 * 1024,
        wants_inputs: bool = False,
        wants_outputs: bool = False,
        keys_only: bool = False,
    ) -> None:
        self.deployment = deployment
        self.version = version
        self.mode = mode
        self.digest = digest
        self.limit = rows * WIDTH
        self.bytes_limit = bytes_limit
        self.wants_inputs = wants_inputs
        self.wants_outputs = wants_outputs
        self.rows: list[Any] = []
        self.dropped = 0
        self.waiting = 0
        """Bytes of inputs and outputs in the ring."""
        self.keys: list[bytes] = []
        self.note_key: Callable[[bytes], None] | None = self.keys.append if keys_only else None
        """Where only keys are wanted (the profile, no log) this is all that a row costs: call it in place of `note`."""
        self.note_keys: Callable[[list[bytes]], None] | None = self.keys.extend if keys_only else None
        """`note_key` for several at once."""
        self._turns: list[_Turn] = []
        # Rows in `_turns` so far; each number is written by one thread only.
        self._noted = self._drained = 0
        self._late: list[Any] = []
        self._late_from = 0

    def note(
        self, key: bytes, where: int, seconds: float, raws: Sequence[bytes] | None, record: bytes | None
    ) -> None:
        """One row was answered.

        ``where``: a code of `parbake.contract.where`; ``raws``: each input's raw bytes; ``record``: the outputs as
        `parbake.contract.record` joins them.
        """
        # Never `self.rows +=`: that would put back a list that has been taken out in between.
        rows = self.rows
        if len(rows) + WIDTH * (self._noted - self._drained) >= self.limit:
            self.dropped += 1
            return
        if raws is not None or record is not None:
            size = (sum(map(len, raws)) if raws is not None else 0) + (
                len(record) if record is not None else 0
            )
            if self.waiting + size > self.bytes_limit:
                self.dropped += 1
                return
            self.waiting += size
        rows += (key, where, seconds, raws, record, time())

    def note_turn(
        self,
        where: int,
        keys: list[bytes],
        seconds: list[float],
        raws: Sequence[Sequence[bytes]] | None = None,
        records: Sequence[bytes] | None = None,
    ) -> None:
        """Rows that were answered at about the same moment: their keys, and how long each took.

        ``raws`` and ``records`` are as for `note`, one for each row, where they are wanted; all rows are of one size.
        """
        count = len(keys)
        if len(self.rows) + WIDTH * (self._noted - self._drained + count) > self.limit:
            self.dropped += count
            return
        if raws is not None or records is not None:
            size = sum(map(len, raws[0])) if raws else 0
            if records:
                size += len(records[0])
            if self.waiting + size * count > self.bytes_limit:
                self.dropped += count
                return
            self.waiting += size * count
        # Joined now, as they have just been in use: later each of them may have to be fetched from memory.
        joined, packed = b"".join(keys), struct.pack(f"{count}d", *seconds)
        self._turns.append((where, time(), count, joined, packed, raws, records))
        self._noted += count

    @property
    def backlog(self) -> int:
        """Rows that wait to be taken out."""
        return len(self.rows) // WIDTH + self._noted - self._drained + len(self.keys)

    def drain_keys(self) -> bytes:
        """Take out what `note_key` was given, joined."""
        keys = self.keys
        # The other thread only adds at the end.
        count = len(keys)
        taken = keys[:count]
        del keys[:count]
        return b"".join(taken)

    def trim(self) -> None:
        """Where nobody drains, forget the keys beyond the limit. For the thread that notes."""
        if len(self.keys) * WIDTH > self.limit:
            self.dropped += len(self.keys)
            self.keys.clear()

    def refused(self, code: str, seconds: float, key: bytes = b"") -> None:
        """One row was answered with the error of that code."""
        if self.note_key is not None:
            return
        rows = self.rows
        if len(rows) + WIDTH * (self._noted - self._drained) < self.limit:
            rows += (key, REFUSED, seconds, code, None, time())
        else:
            self.dropped += 1

    def drain(self) -> Rows | None:
        """Take everything out; None if there is nothing.

        For one background thread, and not twice within a thread's turn (`sys.getswitchinterval`): a row that is being
        added while the list is taken out comes with the next call.
        """
        taken = self.rows
        self.rows = []
        self.waiting = 0
        # The other thread may have stood between reading `rows` and adding to it: such a row comes with the next turn.
        late = self._late[self._late_from :]
        end = len(taken)
        self._late, self._late_from = taken, end
        # The other thread only adds at the end.
        count = len(self._turns)
        turns = self._turns[:count]
        del self._turns[:count]
        if not late and not end and not turns:
            return None
        keys, where, seconds, extras, records, times = (
            late[column::WIDTH] + taken[column:end:WIDTH] for column in range(WIDTH)
        )
        joined, places = b"".join(keys), bytes(where)
        took, moments = _floats(seconds), array("d", times)
        if turns:
            some_places, some_moments, counts, some_keys, some_seconds, some_raws, some_records = zip(
                *turns, strict=True
            )
            joined += b"".join(some_keys)
            took.frombytes(b"".join(some_seconds))
            extras += _or_none(some_raws, counts)
            records += _or_none(some_records, counts)
            places += np.repeat(np.array(some_places, np.uint8), counts).tobytes()
            moments.frombytes(np.repeat(np.array(some_moments), counts).tobytes())
            self._drained += sum(counts)
        return Rows(joined, keys, places, took, extras, records, moments)


_Turn: TypeAlias = tuple[
    int, float, int, bytes, bytes, Sequence[Sequence[bytes]] | None, Sequence[bytes] | None
]


def _or_none(columns: Sequence[Sequence[Any] | None], counts: Sequence[int]) -> Iterable[Any]:
    """What there is of some turns, one after another; None for each row of those without."""
    if not any(columns):
        return [None] * sum(counts)
    return chain.from_iterable(
        repeat(None, count) if column is None else column
        for column, count in zip(columns, counts, strict=True)
    )


def _floats(values: list[float]) -> array[float]:
    # By way of struct, which takes in a list three times as fast.
    return array("d", struct.pack(f"{len(values)}d", *values))
