"""What only a sequence of keys can tell: how much of what comes was there before, and what is never asked for again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]
"""Keys in the order they were asked for, numbered from 0 in the order of their first appearance."""


def numbered(keys: npt.NDArray[np.generic]) -> Keys:
    """Any sequence of keys as `Keys`."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first, kind="stable")] = np.arange(len(first))
    numbers: Keys = order[inverse.reshape(-1)]
    return numbers


def unseen_and_unasked(keys: Keys) -> tuple[float, float]:
    """What a table baked from the first half would meet in the second.

    The share of the second half's requests whose key the first half did not have, and the share of the first
    half's keys that nobody asks for in the second.
    """
    half = len(keys) // 2
    before, after = np.unique(keys[:half]), keys[half:]
    if not len(before):
        return 1.0, 0.0
    return float(np.mean(~np.isin(after, before))), float(np.mean(~np.isin(before, after)))
