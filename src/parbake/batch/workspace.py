"""The folder beside a table in which a bake works: one bake at a time, and what an interrupted one left.

::

    .eta.table.baking/
        lock
        state.json       what is baked from what; anything else than the same starts afresh
        segments/
        input            the standard input, where it must be read twice
        table/           the table, until it is complete
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec
from msgspec import Struct

from parbake.batch import segments
from parbake.batch.model import OnBad
from parbake.batch.segments import Segment
from parbake.contract.ort import onnxruntime
from parbake.errors import TableError

_FORMAT: Final = 1
_LOCK_TRIES: Final = 10


class BakeState(Struct, frozen=True):
    """What segments depend on, besides the rows that they name."""

    bundle_digest: str
    input_format: str
    input_identity: str
    """Empty where pieces carry digests of their content."""
    libraries: str
    """Versions of what computes; a prediction's last bits may depend on them."""
    format: int = _FORMAT


class Workspace:
    """Claims the folder on entering, and lets go of it on leaving. Raises `TableError` where another bake has it."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out.with_name(f".{out.name}.baking")
        self.segments = self.folder / "segments"
        self.spool = self.folder / "input"
        self.table = self.folder / "table"
        self._state = self.folder / "state.json"
        self._lock = -1

    def __enter__(self) -> Workspace:
        for _ in range(_LOCK_TRIES):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "lock"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The bake that had the lock may have finished and removed the folder in between.
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    self._lock = descriptor
                    break
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise TableError(
                        f"another bake is writing {self._out}",
                        hint="wait until it has ended, or name another --out",
                    ) from error
                raise
            os.close(descriptor)
        else:
            raise TableError(
                f"{self.folder} cannot be claimed", hint="is something removing it all the time?"
            )
        self.segments.mkdir(exist_ok=True)
        for stale in self._out.parent.glob(f".{self._out.name}.baked-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.interrupted:
            # Nothing was done that a later run could use.
            self.remove()
        os.close(self._lock)

    def resume(
        self, state: BakeState, on_bad: OnBad, known: Collection[tuple[int, bytes]] | None
    ) -> list[Segment]:
        """The segments of an earlier run of the same bake that can be used; all others are removed.

        ``known`` are start and digest of the input's pieces, where it has been read for them. Of segments
        that share rows one is used: a worker that outlived its bake for a moment may have written late.
        """
        usable: list[Segment] = []
        taken: list[tuple[int, int]] = []
        for segment in segments.read_all(self.segments) if self._read_state() == state else ():
            pieces = segment.header.pieces
            sound = known is None or all((piece.start, piece.digest) in known for piece in pieces)
            together = sorted([*taken, *((piece.start, piece.stop) for piece in pieces)])
            apart = all(one[1] <= other[0] for one, other in itertools.pairwise(together))
            if sound and apart and not (segment.header.tally.skipped and on_bad == "error"):
                taken = together
                usable.append(segment)
        kept = {segment.path for segment in usable}
        for path in self.segments.iterdir():
            if path not in kept:
                path.unlink()
        staging = self._state.with_suffix(".new")
        staging.write_bytes(msgspec.json.encode(state))
        staging.rename(self._state)
        return usable

    @property
    def interrupted(self) -> bool:
        """Whether an earlier run left something."""
        return self._state.exists() and any(self.segments.iterdir())

    def remove(self) -> None:
        """Remove the folder, once the table is published."""
        # Renamed first: a bake that begins now must not find a folder that is half gone.
        aside = self._out.with_name(f".{self._out.name}.baked-{os.getpid()}")
        self.folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _read_state(self) -> BakeState | None:
        try:
            return msgspec.json.decode(self._state.read_bytes(), type=BakeState)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None


def computing_libraries() -> str:
    """Names and versions of the libraries on which a prediction's last bits may depend."""
    import numpy
    import pyarrow

    return " ".join(
        f"{library.__name__} {library.__version__}" for library in (numpy, onnxruntime(), pyarrow)
    )
