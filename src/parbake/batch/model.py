"""What baking passes around: how a file is read, a piece of it, the rows that do not fit, what was scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from msgspec import Struct

Format = Literal["parquet", "csv", "arrow", "jsonl"]
FORMATS: Final[tuple[Format, ...]] = ("parquet", "csv", "arrow", "jsonl")

OnBad = Literal["error", "skip"]
"""What to do with a row that does not fit the contract."""

EXAMPLES: Final = 10
"""Bad rows that are named; all are counted."""

Progress = Callable[[int, int | None], None]
"""Called with the rows done and, where it is known, their total."""


class Binding(Struct, frozen=True):
    """Which columns of the file make one input of the contract: one, or those of a matrix in order."""

    input: str
    columns: tuple[str, ...]
    matrix: bool = False


class FileLayout(Struct, frozen=True):
    """How the rows of a file are read: all that a worker needs to know of it."""

    name: str
    """The file as messages call it."""
    format: Format
    bindings: tuple[Binding, ...]
    extra: tuple[str, ...] = ()
    """Columns that no input needs."""
    path: str = ""
    """Where a worker opens the file itself (Parquet)."""
    header: tuple[str, ...] = ()
    """All columns of a CSV file in order."""
    delimiter: str = ","

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(dict.fromkeys(name for binding in self.bindings for name in binding.columns))


class Piece(Struct, frozen=True):
    """A part of the input that is scored as a whole, and done or not done as a whole.

    Parquet and Arrow: ``start`` and ``stop`` count rows. Text: they count bytes of the file.
    """

    start: int
    stop: int
    first: int = 0
    """Text: number of the first line."""
    group: int = 0
    """Parquet: the row group."""
    group_start: int = 0
    """Parquet: rows of the file before this group."""
    digest: bytes = b""
    """What the piece held, where it was handed over; empty where the worker read it itself."""


class BadRow(Struct, frozen=True, order=True):
    """One row that does not fit the contract."""

    number: int
    """Row or line of the file, counted from 1."""
    where: str
    reason: str
    hint: str = ""


class Tally(Struct, frozen=True):
    """What became of the rows of one or more pieces."""

    scored: int = 0
    skipped: int = 0
    duplicates: int = 0
    """Scored rows whose key and record another row of the same segment has."""
    examples: tuple[BadRow, ...] = ()

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        examples = tuple(sorted({*self.examples, *other.examples})[:EXAMPLES])
        return Tally(
            self.scored + other.scored,
            self.skipped + other.skipped,
            self.duplicates + other.duplicates,
            examples,
        )


@dataclass(frozen=True, slots=True)
class Scored:
    """What a run over the whole input came to."""

    tally: Tally
    resumed: int
    """Rows that an earlier, interrupted run had scored already."""
    workers: int
    """Processes that scored, this one included."""
