"""What serving needs from outside: a prediction table to look rows up in."""

from __future__ import annotations

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
