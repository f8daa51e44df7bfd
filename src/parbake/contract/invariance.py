"""Measure whether a row's bits depend on its company in a batch, or on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np

from parbake.contract.datatypes import FLOATS
from parbake.contract.model import Batch, TensorSpec
from parbake.contract.parity import rounded_up, spread_rows
from parbake.contract.tensors import Tensor, Tensors, to_raw

Run = Callable[[Tensors], Mapping[str, Tensor]]

SIZES: Final = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 64)
"""Batch sizes that are compared: at, below and above the widths at which kernels change."""

LARGE_SIZES: Final = (128, 257, 1024)
"""Compared too where rows are cheap."""

OTHER_SIZES: Final = (1, 2, 3, 6, 10, 11, 12, 13, 15, 23, 24, 40, 47, 63, 100, 129, 200, 999)
"""Sizes on which a policy is tried once it was found."""

THREADED_SIZES: Final = (1, 2, 3, 8, 17, 32, 50, 51, 64, 100, 128, 1000)
"""Sizes at which runtimes share work out among threads in different ways."""

MULTIPLES: Final = (2, 4, 8, 16, 32)
"""Widths of the packets in which kernels take numbers: one by one, the rest of a batch gives other last bits."""

MOST_PADDING: Final = 32
"""Largest batch to which lone rows would be padded."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried: last bits differ on few rows, so the more the better, as far as time allows."""

    rows: int
    """Different rows."""
    largest: int
    """Largest batch."""

    def sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those of the sizes that are not too large."""
        return tuple(size for size in sizes if size <= self.largest)


THOROUGH: Final = Effort(256, 1024)
"""Some 30,000 rows in all: for models that take microseconds a row."""

MODERATE: Final = Effort(8, 64)
"""Some 1,000 rows in all."""

SCANT: Final = Effort(3, 3)
"""Some 30 rows in all: for models that take a good part of a second."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What putting the same rows into different batches showed."""

    invariant_from: int | None
    """Smallest size from which all batches gave the same bits; None: there is none up to `MOST_PADDING`."""
    multiple_of: int = 1
    """What the size must be a multiple of for that."""
    spread: float = 0.0
    """Largest absolute difference between answers to the same row, over all sizes."""
    labels_differ: bool = False
    """Whether an output that is not floating-point differed where no size is invariant."""


def company(example: Tensors, inputs: Sequence[TensorSpec], rows: int, *, seed: int = 0) -> dict[str, Tensor]:
    """``rows`` different rows: the example's own, then variations of them with other numbers."""
    base = spread_rows(example, rows)
    count = len(next(iter(base.values())))
    if count >= rows:
        return base
    rng = np.random.default_rng(seed)
    at = np.arange(rows) % count
    varied: dict[str, Tensor] = {}
    for spec in inputs:
        array = np.array(base[spec.name][at])
        if spec.datatype in FLOATS:
            factor = rng.uniform(0.5, 1.5, array.shape).astype(array.dtype)
            with np.errstate(all="ignore"):
                array[count:] = (array * factor)[count:]
        elif count > 1:
            array[count:] = array[rng.permutation(rows)[count:] % count]
        varied[spec.name] = array
    return varied


def measure(
    run: Run, pool: Tensors, outputs: Sequence[TensorSpec], *, effort: Effort = THOROUGH, seed: int = 0
) -> Findings:
    """Run the rows of ``pool`` alone and in batches of `SIZES`, at different places with different company.

    ``run`` takes any number of rows and must not pad. Of the policies that make a row's bits independent,
    the one that pads a lone row least is given.
    """
    rng = np.random.default_rng(seed)
    sizes = effort.sizes(SIZES + LARGE_SIZES)
    seen = {size: _Seen(run, pool, outputs, size, rng) for size in sizes}
    for least in range(1, MOST_PADDING + 1):
        if least in seen and _same([seen[size] for size in sizes if size >= least]):
            return Findings(least)
        if least in MULTIPLES:
            padded = _padding(run, least)
            if _steady(padded, pool, outputs, sizes, rng):
                return Findings(least, least)
    labels = [spec for spec in outputs if spec.datatype not in FLOATS]
    differ = bool(labels) and not _steady(run, pool, labels, sizes, rng)
    return Findings(None, 1, rounded_up(_spread(run, pool, outputs, sizes, rng)), differ)


def holds(
    run: Run, pool: Tensors, outputs: Sequence[TensorSpec], *, effort: Effort = THOROUGH, seed: int = 7
) -> bool:
    """Whether ``run`` (which pads as the contract says) gives each row the same bits in any batch."""
    rng = np.random.default_rng(seed)
    return _steady(run, pool, outputs, effort.sizes(OTHER_SIZES), rng, rounds=1)


def threads_matter(
    one: Run,
    several: Sequence[Run],
    pool: Tensors,
    outputs: Sequence[TensorSpec],
    *,
    effort: Effort = THOROUGH,
    seed: int = 3,
) -> bool:
    """Whether any of ``several`` (the same model with more threads) gives other bits than ``one`` (one thread)."""
    rows = len(next(iter(pool.values())))
    rng = np.random.default_rng(seed)
    for size in effort.sizes(THREADED_SIZES):
        # Lone rows are where trees are shared out among threads: many of them are tried.
        for chosen in _batches(rows, size, rng, rounds=1)[: 32 if size == 1 else 4]:
            batch = {name: array[chosen] for name, array in pool.items()}
            expected = _bits(one(batch), outputs, size)
            if any(not np.array_equal(expected, _bits(run(batch), outputs, size)) for run in several):
                return True
    return False


def policy(findings: Findings, dimension: str, one_thread: bool, max_rows: int) -> Batch:
    """The contract's `Batch` for what was measured."""
    return Batch(
        dimension=dimension,  # type: ignore[arg-type]  # one of the three
        invariant_from=findings.invariant_from,
        multiple_of=findings.multiple_of,
        spread=0.0 if findings.invariant_from is not None else findings.spread,
        one_thread=one_thread,
        max_rows=max_rows,
    )


class _Seen:
    """The bits that the rows of a pool had in batches of one size."""

    def __init__(
        self,
        run: Run,
        pool: Tensors,
        outputs: Sequence[TensorSpec],
        size: int,
        rng: np.random.Generator,
        rounds: int = 2,
    ) -> None:
        rows = len(next(iter(pool.values())))
        self.first: Tensor | None = None
        self.steady = True
        """Whether each row always had the same."""
        met = np.zeros(rows, dtype=bool)
        for chosen in _batches(rows, size, rng, rounds):
            answer = run({name: array[chosen] for name, array in pool.items()})
            bits = _bits(answer, outputs, size)
            if self.first is None:
                self.first = np.zeros((rows, bits.shape[1]), dtype=np.uint8)
            # A row may stand in a batch twice: its later places are held against the first.
            new = np.flatnonzero(~met[chosen])[::-1]
            self.first[chosen[new]] = bits[new]
            met[chosen] = True
            self.steady = self.steady and bool((self.first[chosen] == bits).all())


def _spread(
    run: Run, pool: Tensors, outputs: Sequence[TensorSpec], sizes: Sequence[int], rng: np.random.Generator
) -> float:
    """Largest absolute difference between finite answers to the same row, over batches of all sizes."""
    rows = len(next(iter(pool.values())))
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    for size in sizes:
        for chosen in _batches(rows, size, rng):
            answer = run({name: array[chosen] for name, array in pool.items()})
            for spec in outputs:
                if spec.datatype not in FLOATS or not spec.fixed:
                    continue
                values = np.asarray(answer[spec.name], dtype=np.float64)
                if spec.name not in low:
                    low[spec.name] = np.full((rows, *values.shape[1:]), np.inf)
                    high[spec.name] = np.full((rows, *values.shape[1:]), -np.inf)
                np.minimum.at(low[spec.name], chosen, values)
                np.maximum.at(high[spec.name], chosen, values)
    spread = 0.0
    for name, least in low.items():
        with np.errstate(all="ignore"):
            gap = high[name] - least
        gap = gap[np.isfinite(gap)]
        spread = max(spread, float(gap.max()) if gap.size else 0.0)
    return spread


def _same(seen: Sequence[_Seen]) -> bool:
    return all(one.steady and np.array_equal(one.first, seen[0].first) for one in seen)  # type: ignore[arg-type]  # set


def _steady(
    run: Run,
    pool: Tensors,
    outputs: Sequence[TensorSpec],
    sizes: Sequence[int],
    rng: np.random.Generator,
    rounds: int = 2,
) -> bool:
    """Whether every row has the same bits in all these sizes. Ends at the first that differs."""
    first: _Seen | None = None
    for size in sizes:
        seen = _Seen(run, pool, outputs, size, rng, rounds)
        first = first or seen
        if not _same([first, seen]):
            return False
    return True


def _padding(run: Run, multiple: int) -> Run:
    """``run`` with its batches padded to a multiple, as the runtime does it."""

    def padded(tensors: Tensors) -> Mapping[str, Tensor]:
        rows = len(next(iter(tensors.values())))
        again = np.arange(-(-rows // multiple) * multiple) % rows
        answer = run({name: array[again] for name, array in tensors.items()})
        return {name: array[:rows] for name, array in answer.items()}

    return padded


def _bits(answer: Mapping[str, Tensor], outputs: Sequence[TensorSpec], rows: int) -> Tensor:
    """The bits of an answer, shape (rows, bytes per row)."""
    parts: list[Tensor] = []
    for spec in outputs:
        array = np.ascontiguousarray(answer[spec.name])
        if array.dtype.kind in "biuf" and spec.fixed:
            parts.append(array.reshape(rows, -1).view(np.uint8))
        else:
            digests = [
                blake2b(to_raw(array[i : i + 1], spec.datatype), digest_size=16).digest() for i in range(rows)
            ]
            parts.append(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(rows, 16))
    return np.concatenate(parts, axis=1) if parts else np.zeros((rows, 0), dtype=np.uint8)


def _batches(rows: int, size: int, rng: np.random.Generator, rounds: int = 2) -> list[Tensor]:
    """Batches of row numbers such that every row is in at least one per round, at places drawn anew."""
    batches = []
    for _ in range(1 if size == 1 else rounds):
        order = rng.permutation(rows)
        count = -(-rows // size)
        filled = np.concatenate([order, rng.integers(0, rows, count * size - rows)])
        # The last batch ends with rows drawn twice; mixed, any row may stand anywhere.
        batches += [rng.permutation(filled[i * size : (i + 1) * size]) for i in range(count)]
    return batches
