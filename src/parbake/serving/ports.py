"""What serving needs from outside: a prediction table to look rows up in, and somebody who takes notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class PredictionTable(Protocol):
    """A published prediction table, open for reading. Safe to read from one thread; cheap to share by path."""

    @property
    def bundle_digest(self) -> str:
        """Digest of the bundle that baked it."""

    @property
    def rows(self) -> int:
        """Number of keys."""

    def get(self, key: bytes) -> bytes | None:
        """The record (`parbake.contract.record`) baked for a key, or None."""

    def close(self) -> None:
        """Release the mapping; `get` must not be called afterwards."""


class Recorder(Protocol):
    """Takes a note of each answered row (the prediction log, the profile of the traffic). Never waits, never raises."""

    note_key: Callable[[bytes], None] | None
    """Where it is set only keys are wanted, by this way."""
    note_keys: Callable[[list[bytes]], None] | None
    """The same for several at once."""

    @property
    def wants_inputs(self) -> bool:
        """Whether the rows themselves are wanted."""

    @property
    def wants_outputs(self) -> bool:
        """Whether the answers are wanted."""

    def note(
        self, key: bytes, where: int, seconds: float, raws: Sequence[bytes] | None, record: bytes | None
    ) -> None:
        """A row was answered: ``where`` is a code of `parbake.contract.where`, ``seconds`` the time in the server."""

    def note_turn(
        self,
        where: int,
        keys: list[bytes],
        seconds: list[float],
        raws: Sequence[Sequence[bytes]] | None = None,
        records: Sequence[bytes] | None = None,
    ) -> None:
        """Rows of one size that were answered at about the same moment; ``raws`` and ``records`` are kept."""

    def refused(self, code: str, seconds: float, key: bytes = b"") -> None:
        """A request was answered with an error."""
