"""What tables are to those who read and write them: entries in key order in, records by key out."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

Records = Bytes | list[bytes]
"""Records of several keys: shape (n, record bytes) where all have one size, else one object each."""


class Table(Protocol):
    """A published prediction table, open for reading. Safe to read from one thread."""

    @property
    def bundle_digest(self) -> str:
        """Digest of the bundle that baked it."""

    @property
    def rows(self) -> int:
        """Number of keys."""

    def get(self, key: bytes) -> bytes | None:
        """The record (`parbake.contract.record`) baked for a key, or None."""

    def close(self) -> None:
        """Release what was opened; `get` must not be called afterwards. Closing twice is allowed."""


class Writer(Protocol):
    """A table being built, not yet visible to anybody."""

    def append(self, keys: Bytes, records: Records) -> None:
        """Add entries: keys of shape (n, 16), each greater than all before it, with their records."""

    def finish(self) -> int:
        """Write all that is left and give the number of entries. Whoever called makes it durable."""

    def abandon(self) -> None:
        """Give up and release the files. Allowed at any time, also after `finish`."""


def as_list(records: Records) -> list[bytes]:
    """Records as one object each."""
    if isinstance(records, list):
        return records
    rows, size = records.shape
    raw: Any = np.ascontiguousarray(records).tobytes()
    return [raw[at : at + size] for at in range(0, rows * size, size)] if size else [b""] * rows
