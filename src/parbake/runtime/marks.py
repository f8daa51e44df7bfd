"""What the models of a room are at work on: marks in a file that outlives the process.

There is one mark for each model: the id of the request that it is at work on. Several fronts may wait for one model,
each with a request of its own. If the process ends, only requests whose ids are marked can have been to blame.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Final

NOTHING: Final = 0
LOADING: Final = (1 << 64) - 1
"""Marks that are no ids of requests: those begin below 2^63 (`parbake.runtime.backends`) and grow by one."""

_MARK: Final = struct.Struct("<Q")


class Marks:
    """The marks of this process. What an earlier one has left there stands until the model is loaded again."""

    def __init__(self, path: Path, models: int) -> None:
        # Kept open for `reserve`.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, models * _MARK.size)
        self._map = mmap.mmap(self._file, models * _MARK.size)

    def reserve(self, slot: int) -> None:
        """Have room for the mark of a model. Raises OSError where the disk is full.

        To write to a page of a mapped file for which there is none would end the process.
        """
        at = slot * _MARK.size
        os.pwrite(self._file, os.pread(self._file, _MARK.size, at), at)

    def put(self, slot: int, mark: int) -> None:
        """Say what a model is at work on: the id of a request, `LOADING` or `NOTHING`."""
        _MARK.pack_into(self._map, slot * _MARK.size, mark)


def read(path: str, slot: int) -> int | None:
    """The mark of a model, also when the process has ended; None where nobody can tell."""
    try:
        # The process may have put anything there, also what would never be opened.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        mark: int = _MARK.unpack(os.pread(file, _MARK.size, slot * _MARK.size))[0]
    except (OSError, struct.error):
        return None
    finally:
        os.close(file)
    return mark


def was_at_work(path: str, slot: int, request_id: int) -> bool:
    """Whether a model was at work on this request, also when its process has ended; yes where nobody can tell."""
    return read(path, slot) in (request_id, None)
