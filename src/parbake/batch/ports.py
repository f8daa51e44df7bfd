"""What scoring needs of a file of rows: pieces to hand out, and a piece's rows as Arrow batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from parbake.batch.model import BadRow, FileLayout, Piece


@dataclass(frozen=True, slots=True)
class Task:
    """A piece with what it holds; the payload is empty where whoever scores it reads the file itself."""

    piece: Piece
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a piece."""

    batch: Any
    """Arrow RecordBatch with the columns of `FileLayout.needed`."""
    numbers: npt.NDArray[np.int64]
    """Number of each row (text: its first line) in the file, counted from 1."""
    bad: tuple[BadRow, ...] = ()
    """Rows of the piece that could not be read at all; they are not in ``batch``."""


class Source(Protocol):
    """A file of rows as it is handed out, piece by piece."""

    @property
    def layout(self) -> FileLayout:
        """How its rows are read."""

    @property
    def total(self) -> int | None:
        """Number of rows, where it is known beforehand."""

    @property
    def small(self) -> bool:
        """Whether all of it is so little that other processes would not be worth their start."""

    @property
    def drained(self) -> bool:
        """Whether everything was handed out."""

    def next(self, worker: int, rows_per_s: float) -> Task | None:
        """The next task for that worker, if it may have one.

        ``rows_per_s`` is how fast it was with the last (0: not known), for sources that can choose a size.
        """

    def finish(self) -> tuple[str, int]:
        """Digest (``blake2b:...``) and size in bytes of the whole input. Raises `InputFileError` if it changed."""

    def close(self) -> None:
        """Let go of the file."""


class Reader(Protocol):
    """Makes rows of tasks."""

    def rows(self, task: Task) -> Iterator[Rows]:
        """The rows of a task, in order. Raises `InputFileError`."""


def where_of(layout: FileLayout, number: int) -> str:
    """A row of the file as messages name it."""
    word = "line" if layout.format in ("csv", "jsonl") else "row"
    return f"{layout.name}, {word} {number}"
