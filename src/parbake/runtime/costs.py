"""Learn what a batch costs: ``a + b*n`` seconds, fitted to measured batches by weighted least squares."""

from __future__ import annotations

from typing import Final

_DECAY: Final = 0.98
"""Weight of a batch relative to the one after it: about the last fifty batches count."""


class BatchCost:
    """Exponentially weighted linear regression of batch time on batch size.

    ``fixed_s`` is a, ``row_s`` is b; both are never negative. Until the first observation `known` is false.
    """

    __slots__ = ("_largest", "_n", "_nn", "_nt", "_t", "_weight", "fixed_s", "row_s", "sloped")

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self.fixed_s = 0.0
        self.row_s = 0.0
        self.sloped = False
        """Whether batches of different sizes have told fixed cost and cost per row apart."""
        self._largest = 0

    @property
    def known(self) -> bool:
        """Whether anything has been measured."""
        return self._weight > 0

    def observe(self, rows: int, seconds: float) -> None:
        """Take one measured batch in."""
        self._weight = self._weight * _DECAY + 1
        self._n = self._n * _DECAY + rows
        self._t = self._t * _DECAY + seconds
        self._nn = self._nn * _DECAY + rows * rows
        self._nt = self._nt * _DECAY + rows * seconds
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n * mean_n
        self._largest = max(self._largest, rows)
        self.sloped = variance > 0.01 * mean_n * mean_n
        if self.sloped:
            slope = (self._nt / self._weight - mean_n * mean_t) / variance
            self.row_s = min(max(slope, 0.0), mean_t / mean_n)
        else:
            # Batches of one size say nothing about the slope: all cost is put on the rows.
            self.row_s = mean_t / mean_n
        self.fixed_s = max(mean_t - self.row_s * mean_n, 0.0)

    def seconds(self, rows: int) -> float:
        """Predicted time of a batch."""
        return self.fixed_s + self.row_s * rows

    def waiting_s(self, batches: int, rows: int) -> float:
        """Predicted time of some batches one after another with ``rows`` rows in all.

        While nothing tells rows from batches apart, a batch is taken to cost what the others did, whatever its
        size: nobody is refused for a cost per row that was never measured.
        """
        if not self.sloped and self._weight:
            return batches * self._t / self._weight
        return self.fixed_s * batches + self.row_s * rows

    def rows_within(self, seconds: float, most: int) -> int:
        """The largest batch predicted to take at most ``seconds``, between 1 and ``most``.

        Two things make it larger. Up to the size where the rows cost as much as the batch itself, rows come almost
        free. And while all batches had one size, twice the largest so far is tried: else a first batch of one row
        would look as if every row cost that much, and there would never be another size to learn from.
        """
        if self.row_s <= 0:
            return most
        room = max((seconds - self.fixed_s) / self.row_s, self.fixed_s / self.row_s)
        if not self.sloped:
            room = max(room, 2 * self._largest)
        return most if room >= most else max(1, int(room))
