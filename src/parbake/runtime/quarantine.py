"""Rows that ended, or held up for good, the process that ran them: known again by a hash, and kept from the model."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from parbake.contract.tensors import Shape
from parbake.errors import RowQuarantined
from parbake.logs import log

_MOST: Final = 1024
"""Requests that are remembered; of more, those accused first are forgotten."""
_LASTS_S: Final = 600.0
"""After this time they may try again: the fault may have been the machine's."""
_ENOUGH: Final = 2
"""So often alone makes a verdict."""


class Quarantine:
    """What one model version must not be asked again for a while. Used from one event loop only."""

    def __init__(self, name: str, clock: Callable[[], float] = monotonic) -> None:
        self._name = name
        self._clock = clock
        self.found: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        """By fingerprint: how often it was alone when it happened, and when that was last."""

    @property
    def rows(self) -> int:
        """Requests that are not tried at present."""
        now = self._clock()
        return sum(times >= _ENOUGH and now - at < _LASTS_S for times, at in self.found.values())

    def suspects(self, raws: Sequence[bytes], shapes: Sequence[Shape]) -> bool:
        """Whether these rows should go alone. Raises `RowQuarantined` where they may not go at all."""
        mark = fingerprint(raws, shapes)
        found = self.found.get(mark)
        if found is None:
            return False
        times, at = found
        if self._clock() - at >= _LASTS_S:
            del self.found[mark]
            return False
        if times >= _ENOUGH:
            raise self.verdict()
        return True

    def accuse(self, raws: Sequence[bytes], shapes: Sequence[Shape], *, alone: bool) -> None:
        """Note that the process was lost over a batch with these rows in it."""
        mark = fingerprint(raws, shapes)
        times, _ = self.found.get(mark, (0, 0.0))
        self._put(mark, times + alone)

    def acquit(self, raws: Sequence[bytes], shapes: Sequence[Shape]) -> None:
        """These rows were answered."""
        self.found.pop(fingerprint(raws, shapes), None)

    def take(self, raws: Sequence[bytes], shapes: Sequence[Shape]) -> None:
        """Keep these rows from the model for a while."""
        self._put(fingerprint(raws, shapes), _ENOUGH)

    def verdict(self) -> RowQuarantined:
        """What the caller is told."""
        return RowQuarantined(
            f"model {self._name!r} loses its process over this row; it is not tried again for {_LASTS_S:g} s",
            hint="leave the row out; the log says when the process ended, and what were its last words",
        )

    def _put(self, mark: bytes, times: int) -> None:
        self.found[mark] = (times, self._clock())
        self.found.move_to_end(mark)
        if times >= _ENOUGH:
            log().error("row.quarantined", deployment=self._name, fingerprint=mark.hex()[:16])
        while len(self.found) > _MOST:
            self.found.popitem(last=False)


def fingerprint(raws: Sequence[bytes], shapes: Sequence[Shape]) -> bytes:
    """Tells the rows of one request from those of others."""
    digest = hashlib.blake2b(digest_size=16)
    for raw, shape in zip(raws, shapes, strict=True):
        digest.update(repr((shape, len(raw))).encode())
        digest.update(raw)
    return digest.digest()
