"""What a process was at work on when it ended: marks in a file that outlives it.

There is one mark for each model that the process runs: the id of the request that the model is at work on. Fronts
share a process, and each of them has a request there. If the process ends, only the one whose id is marked can have
been to blame; the others were not read.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Final

from parbake.runtime import wire

NOTHING: Final = 0
LOADING: Final = wire.LARGEST_ID + 1
"""Marks that are no id of a request."""

_MARK: Final = struct.Struct("<Q")


class Marks:
    """The marks of this process. What an earlier one has left there stands until the model is at work again."""

    def __init__(self, path: Path, models: int) -> None:
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


def beside(socket: str) -> Path:
    """The file of marks of a process that runs one model, which listens there."""
    return Path(socket).with_suffix(".mark")


def read(path: str | Path, slot: int = 0) -> int | None:
    """The mark of a model, also when the process has ended; None where nobody can tell."""
    try:
        with Path(path).open("rb") as file:
            file.seek(slot * _MARK.size)
            mark: int = _MARK.unpack(file.read(_MARK.size))[0]
    except (OSError, struct.error):
        return None
    return mark


def was_at_work(path: str | Path, slot: int, request_id: int) -> bool:
    """Whether a model was at work on this request, also when its process has ended; yes where nobody can tell."""
    return read(path, slot) in (request_id, None)
