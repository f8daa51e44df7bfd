"""Bets against "the challenger is within the margin": evidence that may be looked at however often (e-processes).

A window holds what both versions did in the same while. In each window one bets on the challenger being worse; a bet
is fair at best while the challenger is within the margin, so that the product of all windows (the wealth of one who
began with 1) ever reaches 1 / alpha with a chance of at most alpha (Ville's inequality). Bets are chosen by what was
known before the window, so rates may differ from window to window at will.

All functions take arrays that broadcast, and give the logarithm of what a bet of 1 becomes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EFFECTS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""How much worse than the margin, in shares, is betted on; an equal part of the money on each."""
STAKES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
"""What is betted on losses, as a share of the most that can be."""
SHARES: Final = (0.1, 0.3, 0.6, 0.9, 0.99)
"""Where a share is held against the most that it may be: the shares that are betted on, from there (0) to all (1)."""
_MOST: Final = 0.9
"""Of what it has, nobody loses more by one request."""
_LEAST_RATE: Final = 1e-4


def bet_on_shares(
    n: Any, hits: Any, base_n: Any, base_hits: Any, guess: Any, margin: Any, effect: Any
) -> Floats:
    """Bet that ``hits / n`` is more than ``margin`` above ``base_hits / base_n``, by ``effect``.

    E = prod (1 + a (y - q - m)) prod (1 - b (y - q)) with a n = b base_n. By the inequality of the means E is at most
    ((n (1 + a (p - q - m)) + base_n (1 - b (p' - q))) / (n + base_n)) ** (n + base_n) in expectation, which is at most
    1 wherever p <= p' + m, whatever ``guess`` (of p') is; a better one wins sooner. p and p' are the means over the
    window's requests, which need not be alike. After Turner, Ly & Grünwald (2024) and Turner & Grünwald (2023), with
    the null's point named by the guess instead of a projection. A window that one arm has no part in says nothing.
    """
    n, base_n = np.asarray(n, float), np.asarray(base_n, float)
    both = (n > 0) & (base_n > 0)
    n, base_n = np.where(both, n, 1.0), np.where(both, base_n, 1.0)
    q = np.asarray(guess, float) + effect * n / (n + base_n)
    q = np.clip(
        q, np.maximum(0.0, -np.asarray(margin)) + _LEAST_RATE, 1 - np.maximum(0.0, margin) - _LEAST_RATE
    )
    p = q + margin
    ratio = n / base_n
    a = effect / (p * (1 - p) + q * (1 - q) * ratio)
    a = np.minimum(a, np.minimum(_MOST / p, _MOST / ((1 - q) * ratio)))
    b = a * ratio
    gained = (
        hits * np.log1p(a * (1 - p))
        + (n - hits) * np.log1p(-a * p)
        + base_hits * np.log1p(-b * (1 - q))
        + (base_n - base_hits) * np.log1p(b * q)
    )
    return np.where(both, gained, 0.0)


def bet_on_share(n: Any, hits: Any, most: float, share: Any) -> Floats:
    """Bet that ``hits`` of ``n`` come from a share above ``most``.

    The likelihood ratio of the one that is ``share`` of the way from there to 1. Fair at best wherever each hit has,
    given all before, a chance of at most ``most``, as the bet only grows with it.
    """
    above = most + (1 - most) * np.asarray(share, float)
    gained: Floats = hits * np.log(above / most) + (n - hits) * np.log((1 - above) / (1 - most))
    return gained


def bet_on_means(
    n: Any, total: Any, squares: Any, base_n: Any, base_total: Any, base_squares: Any,
    guess: Any, base_guess: Any, margin: Any, stake: Any,
) -> Floats:  # fmt: skip
    """Bet that a mean of values in 0 to 1 is more than ``margin`` above the other, from sums and sums of squares.

    For x in 0 to 1 with mean m and any guess g in 0 to 1, exp(s (x - m) - psi(s) (x - g)**2) has an expectation of at
    most 1 with psi(s) = -log(1 - s) - s (Fan et al. 2015, Howard et al. 2021: empirical Bernstein); the same for
    1 - x. The product over both arms with stakes s n = s' n' leaves the difference of the means alone.
    """
    n, base_n = np.asarray(n, float), np.asarray(base_n, float)
    both = (n > 0) & (base_n > 0)
    n, base_n = np.where(both, n, 1.0), np.where(both, base_n, 1.0)
    money = stake * n * base_n / (n + base_n)
    spread = squares - 2 * guess * total + n * np.square(guess)
    base_spread = base_squares - 2 * base_guess * base_total + base_n * np.square(base_guess)
    gained = (
        money * (total / n - base_total / base_n - margin)
        - _psi(money / n) * np.maximum(spread, 0.0)
        - _psi(money / base_n) * np.maximum(base_spread, 0.0)
    )
    return np.where(both, gained, 0.0)


def _psi(stake: Any) -> Any:
    return -np.log1p(-stake) - stake


def wealth(logs: Floats, axis: int | tuple[int, ...] = -1) -> Any:
    """The logarithm of the mean of the bets, each of which began with an equal part."""
    top = np.max(logs, axis=axis, keepdims=True)
    mean = np.log(np.mean(np.exp(logs - top), axis=axis, keepdims=True)) + top
    return np.squeeze(mean, axis=axis)


def share_of_alpha(place: int) -> float:
    """What the test that came at ``place`` (from 0) may spend of its family's alpha: together 1, however many come."""
    return 1 / ((place + 1) * (place + 2))
