"""A prediction table in memory: the double for tests, and for tables too small to be worth a file."""

from __future__ import annotations

from collections.abc import Mapping

from parbake.tables.ports import Bytes, Records, as_list


class MemoryTable:
    """A table in a dict, with the methods of one on disk: records by key, both as bytes."""

    def __init__(self, bundle_digest: str, entries: Mapping[bytes, bytes]) -> None:
        self.bundle_digest = bundle_digest
        self._entries: dict[bytes, bytes] = dict(entries)

    @property
    def rows(self) -> int:
        """Number of keys."""
        return len(self._entries)

    def get(self, key: bytes) -> bytes | None:
        """The record of a key, or None."""
        return self._entries.get(key)

    def close(self) -> None:
        """Let go of the entries."""
        self._entries = {}


class MemoryWriter:
    """Collects entries for a `MemoryTable`."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}

    def append(self, keys: Bytes, records: Records) -> None:
        """Add entries in key order."""
        self.entries.update(zip(as_list(keys), as_list(records), strict=True))

    def finish(self) -> int:
        """The number of entries."""
        return len(self.entries)

    def abandon(self) -> None:
        """Nothing is held."""
