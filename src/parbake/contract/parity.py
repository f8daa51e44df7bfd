"""Hold a converted model against its source: on the example, and where the model's answer jumps.

Converters lie quietly: a threshold rounded to float32 changes only the rows that lie beside it, which an
example need not contain. So rows are put there on purpose: at the thresholds that the source names and
at the floats around them, and at jumps that bisection finds between two rows of the example without
knowing what kind of model it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY
from parbake.contract.model import TensorSpec, Tolerance
from parbake.contract.sources.model import Source
from parbake.contract.tensors import Tensor, Tensors

Run = Callable[[Tensors], Mapping[str, Tensor]]

SHOWN: Final = 10
"""Differing rows that are kept to be shown."""

_MAX_EXAMPLES: Final = 2048
_MAX_OWN: Final = 256
_CHUNK_BYTES: Final = 32 * 1024**2
_CHUNK_ROWS: Final = 512
_UNKNOWN_TEXT: Final = "\u2047 unseen"

# Tolerances of floating-point outputs where the source promises none: a few units in the last place of
# the datatype, with room for sums in another order; the absolute part is per size of the answers.
_DEFAULTS: Final[dict[str, tuple[float, float]]] = {
    "FP64": (1e-9, 1e-10),
    "FP32": (1e-5, 1e-6),
    "FP16": (1e-2, 2e-3),
}


@dataclass(frozen=True, slots=True)
class RowDifference:
    """One row on which source and bundle disagree."""

    inputs: Mapping[str, object]
    """What identifies the row for a person: values by input (or by column of a matrix input)."""
    output: str
    expected: object
    got: object

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.inputs.items())
        return f"{given}: {self.output} is {self.expected}, the bundle says {self.got}"


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How source and bundle compared."""

    example_rows: int
    threshold_rows: int
    """Rows put at thresholds, jumps, missing and unknown values."""
    left_out: int
    """Rows that the source itself refuses, so that there is nothing to compare."""
    ties: int
    """Rows whose label rounding decides: the scores agree, and the source flips the label right beside."""
    differing: int
    rows: tuple[RowDifference, ...]
    exact: bool
    """Whether every bit of every compared row was the same."""
    max_abs_diff: float
    refusal: str = ""
    """What the source said of the first row it refused."""

    @property
    def tested(self) -> int:
        """Rows compared."""
        return self.example_rows + self.threshold_rows


def tolerance_for(source: Source, asked: Tolerance | None = None) -> Tolerance:
    """The tolerance to hold a bundle to: what was asked for, what the source promises, or the datatypes' own.

    The default's absolute part grows with the size of the smallest floating-point output of the example.
    """
    if asked is not None:
        return asked
    floats = [spec for spec in source.outputs if spec.datatype in FLOATS]
    if not floats:
        return Tolerance()
    rtol = max(_DEFAULTS[spec.datatype][0] for spec in floats)
    atol = max(_DEFAULTS[spec.datatype][1] for spec in floats)
    if source.atol is None:
        atol *= _scale(source, floats)
    return Tolerance(
        rtol if source.rtol is None else source.rtol,
        float(f"{atol:.0e}") if source.atol is None else source.atol,
    )


def prove(source: Source, run: Run, tolerance: Tolerance, *, seed: int = 0) -> ParityReport:
    """Compare ``run`` (the bundle) with ``source.predict`` on the example and on rows made to find faults.

    Deterministic for a ``seed``. Floating-point outputs must agree within ``tolerance``, anything else
    exactly. The rows made are: thresholds of the source with their neighbours in float64, float32 and the
    input's own type; both sides of jumps found by bisection; zeros, missing and unknown values. Where
    nothing was converted (``own_runtime``) the example alone is compared.
    """
    comparison = _Comparison(source, run, tolerance)
    example = spread_rows(source.example, _MAX_OWN if source.own_runtime else _MAX_EXAMPLES)
    comparison.add(example, example=True)
    if not source.own_runtime and comparison.differing == 0:
        rng = np.random.default_rng(seed)
        usable = comparison.accepted
        if _rows(usable):
            for rows in _made_rows(source, usable, tolerance, rng):
                comparison.add(rows, example=False)
    return comparison.report()


def spread_rows(tensors: Tensors, most: int) -> dict[str, Tensor]:
    """At most ``most`` rows, evenly spread over all of them."""
    rows = _rows(tensors)
    if rows <= most:
        return dict(tensors)
    at = np.linspace(0, rows - 1, most).astype(np.intp)
    return {name: array[at] for name, array in tensors.items()}


def answers_of(
    run: Run, tensors: Tensors, outputs: Sequence[TensorSpec]
) -> tuple[dict[str, Tensor], Tensor, str]:
    """Answers in the outputs' datatypes, which rows were answered (bool), and what the first refusal said.

    Rows that make a batch fail are found by halving it; their answers are zeros.
    """
    rows = _rows(tensors)
    size = _chunk(tensors)
    parts: list[tuple[int, Mapping[str, Tensor]]] = []
    said = ""
    todo = [(at, min(at + size, rows)) for at in range(0, rows, size)][::-1]
    ok = np.zeros(rows, dtype=bool)
    failed_alone = 0
    while todo:
        start, stop = todo.pop()
        if failed_alone > 64 and not ok.any():
            # A model that takes no row at all need not be asked about each.
            continue
        batch = {name: array[start:stop] for name, array in tensors.items()}
        try:
            with np.errstate(all="ignore"):
                answer = as_specs(run(batch), outputs, stop - start)
        except Exception as error:
            said = said or (str(error).strip().splitlines() or [type(error).__name__])[0]
            if stop - start == 1:
                failed_alone += 1
            else:
                middle = (start + stop) // 2
                todo += [(middle, stop), (start, middle)]
            continue
        ok[start:stop] = True
        parts.append((start, answer))
    answers: dict[str, Tensor] = {}
    for spec in outputs:
        found = [(start, answer[spec.name]) for start, answer in parts]
        shape = found[0][1].shape[1:] if found else tuple(max(size, 0) for size in spec.shape)
        full = np.zeros((rows, *shape), dtype=NUMPY[spec.datatype])
        if spec.datatype == "BYTES":
            full[:] = ""
        for start, array in found:
            full[start : start + len(array)] = array
        answers[spec.name] = full
    return answers, ok, said


def as_specs(answer: Mapping[str, Any], outputs: Sequence[TensorSpec], rows: int) -> dict[str, Tensor]:
    """An answer in the outputs' datatypes and row shapes. Raises ValueError or KeyError where it does not fit."""
    cast: dict[str, Tensor] = {}
    for spec in outputs:
        array = np.asarray(answer[spec.name])
        if spec.fixed:
            array = array.reshape(rows, *spec.shape)
        if spec.datatype == "BYTES":
            texts = np.empty(array.size, dtype=object)
            texts[:] = [x.decode() if isinstance(x, bytes) else str(x) for x in array.reshape(-1).tolist()]
            cast[spec.name] = texts.reshape(array.shape)
        else:
            cast[spec.name] = array.astype(NUMPY[spec.datatype], copy=False)
    return cast


class _Comparison:
    """Collects what comparing many batches of rows finds."""

    def __init__(self, source: Source, run: Run, tolerance: Tolerance) -> None:
        self._source = source
        self._run = run
        self._tolerance = tolerance
        self._counts = {True: 0, False: 0}
        self._left_out = 0
        self._ties = 0
        self._exact = True
        self._max_abs_diff = 0.0
        self._refusal = ""
        self._shown: list[RowDifference] = []
        self.differing = 0
        self.accepted: Tensors = {}
        """The rows of the last batch that the source answered."""

    def add(self, rows: Tensors, *, example: bool) -> None:
        """Compare these rows."""
        specs = self._source.outputs
        expected, answered, refusal = answers_of(self._source.predict, rows, specs)
        self._refusal = self._refusal or refusal
        self._left_out += int((~answered).sum())
        rows = {name: array[answered] for name, array in rows.items()}
        expected = {name: array[answered] for name, array in expected.items()}
        self.accepted = rows
        self._counts[example] += _rows(rows)
        if not _rows(rows):
            return
        got, ran, said = answers_of(self._run, rows, specs)
        wrong: dict[str, Tensor] = {}
        for spec in specs:
            wrong[spec.name] = ~_agree(expected[spec.name], got[spec.name], spec, self._tolerance) | ~ran
            self._measure(expected[spec.name][ran], got[spec.name][ran], spec)
        labels_only = np.logical_or.reduce([wrong[s.name] for s in specs])
        for spec in specs:
            if spec.datatype in FLOATS:
                labels_only &= ~wrong[spec.name]
        suspects = np.flatnonzero(labels_only & ran)
        if len(suspects):
            tied = _ties(self._source, rows, suspects, got, self._tolerance)
            self._ties += len(tied)
            for spec in specs:
                wrong[spec.name][tied] = False
        bad = np.flatnonzero(np.logical_or.reduce([wrong[spec.name] for spec in specs]))
        self.differing += len(bad)
        if len(bad):
            self._exact = False
        for row in bad[: SHOWN - len(self._shown)]:
            spec = next(spec for spec in specs if wrong[spec.name][row])
            answer = _shown(got[spec.name][row]) if ran[row] else f"an error: {said}"
            self._shown.append(
                RowDifference(
                    _described(self._source.inputs, rows, int(row)),
                    spec.name,
                    _shown(expected[spec.name][row]),
                    answer,
                )
            )

    def report(self) -> ParityReport:
        """What was found so far."""
        return ParityReport(
            example_rows=self._counts[True],
            threshold_rows=self._counts[False],
            left_out=self._left_out,
            ties=self._ties,
            differing=self.differing,
            rows=tuple(self._shown),
            exact=self._exact,
            max_abs_diff=rounded_up(self._max_abs_diff),
            refusal=self._refusal,
        )

    def _measure(self, expected: Tensor, got: Tensor, spec: TensorSpec) -> None:
        if got.shape != expected.shape:
            self._exact = False
            return
        if spec.datatype not in FLOATS:
            self._exact = self._exact and bool((expected == got).all())
            return
        same = (expected == got) | (np.isnan(expected) & np.isnan(got))
        if not same.all():
            self._exact = False
            with np.errstate(all="ignore"):
                gap = np.abs(expected.astype(np.float64) - got.astype(np.float64))[~same]
            finite = gap[np.isfinite(gap)]
            if len(finite):
                self._max_abs_diff = max(self._max_abs_diff, float(finite.max()))


def _agree(expected: Tensor, got: Tensor, spec: TensorSpec, tolerance: Tolerance) -> Tensor:
    """Per row, whether two answers agree."""
    rows = len(expected)
    if got.shape != expected.shape:
        return np.zeros(rows, dtype=bool)
    if spec.datatype in FLOATS:
        with np.errstate(all="ignore"):
            same = np.isclose(
                got.astype(np.float64), expected.astype(np.float64), rtol=tolerance.rtol, atol=tolerance.atol,
                equal_nan=True,
            )  # fmt: skip
    else:
        same = np.asarray(got == expected, dtype=bool)
    return np.asarray(same.reshape(rows, -1).all(axis=1))


def _ties(
    source: Source, rows: Tensors, suspects: Tensor, got: Mapping[str, Tensor], tolerance: Tolerance
) -> Tensor:
    """Which of the suspects (rows whose label alone differs) are ties: rounding decides them in the source too.

    A row is one if the source gives the bundle's label for inputs that differ from it by about one part in
    10,000 at most, while its own scores stay within twice the tolerance. A label that jumps together with the
    scores, or that nothing nearby has, is no tie. Without scores only a smooth source can have ties.
    """
    specs = source.outputs
    floats = [spec for spec in specs if spec.datatype in FLOATS]
    labels = [spec for spec in specs if spec.datatype not in FLOATS]
    numeric = [spec for spec in source.inputs if spec.datatype in FLOATS]
    if not numeric or not (floats or source.smooth):
        return suspects[:0]
    suspects = suspects[:1024]
    base = {name: array[suspects] for name, array in rows.items()}
    wanted = {spec.name: got[spec.name][suspects] for spec in labels}
    scores, _, _ = answers_of(source.predict, base, specs)
    doubled = Tolerance(2 * tolerance.rtol, 2 * tolerance.atol)
    tied = np.zeros(len(suspects), dtype=bool)
    rng = np.random.default_rng(1)
    for scale in np.linspace(0.0, 1.0, 10):
        for attempt in range(8):
            near = dict(base)
            for spec in numeric:
                array = base[spec.name]
                # From one unit in the last place to one part in 10,000, or 32 units where those are coarser.
                least = float(np.finfo(array.dtype).eps)
                step = least * (max(1e-4, 32 * least) / least) ** scale
                sign = rng.choice([-1.0, 1.0], size=array.shape) * (
                    1.0 if attempt % 2 else rng.random(array.shape)
                )
                typical = np.median(np.nan_to_num(np.abs(rows[spec.name])), axis=0)
                sizes = np.where(array == 0, typical, np.abs(array))
                near[spec.name] = (array + sign * step * sizes).astype(array.dtype)
            answers, ok, _ = answers_of(source.predict, near, specs)
            hit = ok.copy()
            for spec in labels:
                hit &= _agree(wanted[spec.name], answers[spec.name], spec, tolerance)
            for spec in floats:
                hit &= _agree(scores[spec.name], answers[spec.name], spec, doubled)
            tied |= hit
            if tied.all():
                return suspects
    return np.asarray(suspects[tied])


def _made_rows(
    source: Source, base: Tensors, tolerance: Tolerance, rng: np.random.Generator
) -> Iterator[Tensors]:
    """Batches of rows that a wrong conversion is likely to answer wrongly."""
    places = _places(source.inputs, base)
    total = len(places)
    budget = 12288 if total <= 1024 else 256 if total <= 65536 else 32
    if source.thresholds:
        yield from _at_thresholds(source, base, budget, rng)
    yield from _at_special_values(source, base, budget // 16, rng)
    pairs = 192 if total <= 1024 else 32 if total <= 65536 else 8
    yield from _at_jumps(source, base, places, pairs, tolerance, rng)


Place = tuple[TensorSpec, int]


def _places(inputs: Sequence[TensorSpec], base: Tensors) -> list[Place]:
    """Every element of a row that is a number, as input and flat position."""
    found: list[Place] = []
    for spec in inputs:
        if spec.datatype in FLOATS or spec.datatype in INTEGERS:
            found += [(spec, i) for i in range(math.prod(base[spec.name].shape[1:]))]
    return found


def _at_thresholds(source: Source, base: Tensors, budget: int, rng: np.random.Generator) -> Iterator[Tensors]:
    by_name = {spec.name: spec for spec in source.inputs}
    known: list[tuple[TensorSpec, int, float]] = []
    for (name, position), named in sorted(source.thresholds.items()):
        spec = by_name[name]
        if spec.datatype in FLOATS or spec.datatype in INTEGERS:
            known += [(spec, position, value) for value in sorted({float(value) for value in named})]
    if not known:
        return
    each = 12
    chosen = [known[i] for i in sorted(rng.permutation(len(known))[: max(1, budget // each)])]
    single: list[tuple[TensorSpec, int, Tensor]] = []
    for spec, position, value in chosen:
        single.append((spec, position, neighbours(value, spec.datatype)))
    count = sum(len(values) for _, _, values in single)
    rows = _copies(base, rng.integers(0, _rows(base), count))
    at = 0
    for spec, position, values in single:
        flat = rows[spec.name].reshape(count, -1)
        flat[at : at + len(values), position] = values
        at += len(values)
    yield rows
    # All inputs at thresholds at once: deep branches that changing one value at a time does not reach.
    by_place: dict[tuple[str, int], list[Tensor]] = {}
    for spec, position, values in single:
        by_place.setdefault((spec.name, position), []).append(values)
    many = budget // 6
    rows = _copies(base, rng.integers(0, _rows(base), many))
    for (name, position), groups in by_place.items():
        pool = np.concatenate(groups)
        moved = rng.random(many) < 0.5
        flat = rows[name].reshape(many, -1)
        flat[moved, position] = rng.choice(pool, int(moved.sum()))
    yield rows


def neighbours(value: float, datatype: str) -> Tensor:
    """A threshold as the values of a datatype that lie at and around it, in float64, float32 and the datatype."""
    with np.errstate(all="ignore"):
        double = np.float64(value)
        single = np.float32(value)
        around = [
            double, np.nextafter(double, np.inf), np.nextafter(double, -np.inf),
            *(np.float64(x) for x in _three(single)), *(np.float64(x) for x in _three(np.float16(value))),
        ]  # fmt: skip
        dtype = NUMPY[datatype]
        if datatype in INTEGERS:
            limits = np.iinfo(dtype)  # type: ignore[type-var]  # an integer dtype
            ends = (math.floor(value), math.ceil(value)) if math.isfinite(value) else ()
            whole = {end + step for end in ends for step in (-1, 0, 1)}
            return np.array(sorted(w for w in whole if limits.min <= w <= limits.max), dtype=dtype)
        found = np.array(around).astype(dtype)
        own = np.array(_three(np.array(value, dtype=dtype)[()]))
        near = np.abs(found.astype(np.float64) - value) <= 1e-3 * max(abs(value), 1e-30)
        found = np.unique(np.concatenate([found[near], own]))
    return np.asarray(found[np.isfinite(found)])


def _three(value: Any) -> list[Any]:
    infinity = type(value)(np.inf)
    return [value, np.nextafter(value, infinity), np.nextafter(value, -infinity)]


def _at_special_values(
    source: Source, base: Tensors, most: int, rng: np.random.Generator
) -> Iterator[Tensors]:
    """Zeros of both signs, missing values where they are allowed, whole steps, unknown and empty strings."""
    for spec in source.inputs:
        array = base[spec.name]
        width = math.prod(array.shape[1:])
        values: list[Any] = []
        if spec.datatype in FLOATS:
            values = [0.0, -0.0, 1e-36]
            if spec.allow_nan:
                values += [np.nan, np.inf, -np.inf]
            if source.thresholds:
                values += [1e30, -1e30] if spec.datatype != "FP16" else [6e4, -6e4]
        elif spec.datatype == "BYTES":
            values = ["", _UNKNOWN_TEXT]
        elif spec.datatype == "BOOL":
            values = [True, False]
        places = rng.permutation(width)[: max(1, most // max(1, len(values) or 2))]
        if values:
            places = np.repeat(places, len(values))
            rows = _copies(base, rng.integers(0, _rows(base), len(places)))
            flat = rows[spec.name].reshape(len(places), -1)
            with np.errstate(all="ignore"):
                for i, place in enumerate(places):
                    flat[i, place] = values[i % len(values)]
            yield rows
        elif spec.datatype in INTEGERS:
            limits = np.iinfo(array.dtype)
            rows = _copies(base, rng.integers(0, _rows(base), 2 * len(places)))
            flat = rows[spec.name].reshape(2 * len(places), -1)
            for i, place in enumerate(np.repeat(places, 2)):
                stepped = int(flat[i, place]) + (1 if i % 2 else -1)
                flat[i, place] = min(max(stepped, limits.min), limits.max)
            yield rows


def _at_jumps(
    source: Source,
    base: Tensors,
    places: list[Place],
    pairs: int,
    tolerance: Tolerance,
    rng: np.random.Generator,
) -> Iterator[Tensors]:
    """Both sides of the places where the source's answer jumps between two rows that differ in one number.

    Bisection over the representable values: the half across which the answer changes more is kept until
    the two ends are neighbours. Where they still differ by more than the tolerance there is a jump.
    """
    rows = _rows(base)
    if rows < 2 or not places:
        return
    tries = pairs * 4
    first = rng.integers(0, rows, tries)
    second = (first + rng.integers(1, rows, tries)) % rows
    chosen = [places[int(i)] for i in rng.integers(0, len(places), tries)]
    low, high = _copies(base, first), _copies(base, first)
    for i, (spec, position) in enumerate(chosen):
        high[spec.name].reshape(tries, -1)[i, position] = base[spec.name].reshape(rows, -1)[
            second[i], position
        ]
    low_answers, low_ok, _ = answers_of(source.predict, low, source.outputs)
    high_answers, high_ok, _ = answers_of(source.predict, high, source.outputs)
    apart = _distance(low_answers, high_answers, source.outputs, tolerance)
    keep = np.flatnonzero(low_ok & high_ok & (apart > 1.0) & _finite_ends(low, high, chosen))[:pairs]
    if not len(keep):
        return
    chosen = [chosen[int(i)] for i in keep]
    low = {name: array[keep] for name, array in low.items()}
    low_answers = {name: array[keep] for name, array in low_answers.items()}
    high_answers = {name: array[keep] for name, array in high_answers.items()}
    left = _keys_of(low, chosen)
    right = _keys_of({name: array[keep] for name, array in high.items()}, chosen)
    for _ in range(66):
        live = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if abs(b - a) > 1]
        if not live:
            break
        middle = [(left[i] + right[i]) // 2 for i in live]
        at = _with_keys({name: array[live] for name, array in low.items()}, [chosen[i] for i in live], middle)
        answers, ok, _ = answers_of(source.predict, at, source.outputs)
        to_low = _distance({n: a[live] for n, a in low_answers.items()}, answers, source.outputs, tolerance)
        to_high = _distance(answers, {n: a[live] for n, a in high_answers.items()}, source.outputs, tolerance)
        for k, i in enumerate(live):
            if ok[k] and to_low[k] >= to_high[k]:
                right[i] = middle[k]
                for name in high_answers:
                    high_answers[name][i] = answers[name][k]
            elif ok[k]:
                left[i] = middle[k]
                for name in low_answers:
                    low_answers[name][i] = answers[name][k]
            else:
                # The source refuses what lies between: not a jump of its answer.
                right[i] = left[i]
    probed: list[Tensors] = []
    for offset in (-1, 0, 1, 2):
        keys = [min(a, b) + offset for a, b in zip(left, right, strict=True)]
        probed.append(_with_keys(low, chosen, keys))
    yield {name: np.concatenate([part[name] for part in probed]) for name in low}


def _finite_ends(low: Tensors, high: Tensors, chosen: list[Place]) -> Tensor:
    ends = []
    for i, (spec, position) in enumerate(chosen):
        rows = len(low[spec.name])
        pair = [side[spec.name].reshape(rows, -1)[i, position] for side in (low, high)]
        ends.append(all(np.isfinite(value) for value in pair))
    return np.array(ends, dtype=bool)


def _keys_of(rows: Tensors, chosen: list[Place]) -> list[int]:
    return [_to_key(rows[spec.name].reshape(len(chosen), -1)[i, at]) for i, (spec, at) in enumerate(chosen)]


def _with_keys(rows: Tensors, chosen: list[Place], keys: list[int]) -> dict[str, Tensor]:
    changed = {name: array.copy() for name, array in rows.items()}
    for i, (spec, position) in enumerate(chosen):
        flat = changed[spec.name].reshape(len(keys), -1)
        flat[i, position] = _from_key(keys[i], flat.dtype)
    return changed


_UNSIGNED: Final[dict[int, Any]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def _to_key(value: Any) -> int:
    """A number's place in the order of all numbers of its type, so that neighbours differ by one."""
    if value.dtype.kind in "iu":
        return int(value)
    bits = int(value.view(_UNSIGNED[value.dtype.itemsize]))
    sign = 1 << (8 * value.dtype.itemsize - 1)
    return bits if bits < sign else sign - bits


def _from_key(key: int, kind: np.dtype[Any]) -> Any:
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return min(max(key, limits.min), limits.max)
    sign = 1 << (8 * kind.itemsize - 1)
    bits = key if key >= 0 else sign - key
    return _UNSIGNED[kind.itemsize](bits).view(kind)


def _distance(a: Tensors, b: Tensors, specs: Sequence[TensorSpec], tolerance: Tolerance) -> Tensor:
    """Per row, how far two answers are apart in units of the tolerance; infinite where a label differs."""
    rows = _rows(a)
    far = np.zeros(rows)
    for spec in specs:
        left, right = a[spec.name].reshape(rows, -1), b[spec.name].reshape(rows, -1)
        if spec.datatype in FLOATS:
            x, y = left.astype(np.float64), right.astype(np.float64)
            with np.errstate(all="ignore"):
                unit = tolerance.atol + tolerance.rtol * np.maximum(np.abs(x), np.abs(y))
                ratio = np.where(x == y, 0.0, np.abs(x - y) / np.maximum(unit, 1e-300))
            ratio = np.where(np.isnan(x) & np.isnan(y), 0.0, np.where(np.isnan(ratio), np.inf, ratio))
        else:
            ratio = np.where(np.asarray(left == right, dtype=bool), 0.0, np.inf)
        if ratio.size:
            far = np.maximum(far, ratio.max(axis=1))
    return far


def _scale(source: Source, floats: Sequence[TensorSpec]) -> float:
    """The power of ten at or above the largest answer of the output with the smallest answers."""
    answers, ok, _ = answers_of(source.predict, spread_rows(source.example, 256), source.outputs)
    sizes = []
    for spec in floats:
        values = np.abs(answers[spec.name][ok].astype(np.float64))
        values = values[np.isfinite(values)]
        if len(values) and values.max() > 0:
            sizes.append(float(values.max()))
    return float(10.0 ** math.ceil(math.log10(min(sizes)))) if sizes else 1.0


def _described(inputs: Sequence[TensorSpec], rows: Tensors, row: int) -> dict[str, object]:
    """One row as a person reads it, up to 16 values."""
    found: dict[str, object] = {}
    for spec in inputs:
        value = rows[spec.name][row]
        if spec.columns and np.ndim(value) == 1 and len(spec.columns) == len(value):
            found.update({name: _shown(item) for name, item in zip(spec.columns, value, strict=True)})
        else:
            found[spec.name] = _shown(value)
    kept = dict(list(found.items())[:16])
    if len(found) > len(kept):
        kept["..."] = f"{len(found) - len(kept)} more"
    return kept


def _shown(value: Any) -> str:
    array = np.asarray(value)
    if array.size == 1:
        item = array.reshape(-1)[0]
        # The shortest text that gives the same float back.
        return (
            str(item)
            if array.dtype.kind in "fc"
            else repr(item.item() if isinstance(item, np.generic) else item)
        )
    if array.dtype.kind == "f":
        text = ", ".join(str(x) for x in array.reshape(-1)[:6])
    else:
        text = ", ".join(repr(x) for x in array.reshape(-1)[:6].tolist())
    return f"[{text}{', ...' if array.size > 6 else ''}]"


def rounded_up(value: float) -> float:
    """Two digits, upwards: later digits depend on how the source's threads happened to add."""
    if value == 0.0 or not math.isfinite(value):
        return value
    digits = 1 - math.floor(math.log10(value))
    shift = 10.0 ** (-digits)
    return float(f"{math.ceil(value / shift - 1e-9) * shift:.1e}")


def _copies(base: Tensors, at: Tensor) -> dict[str, Tensor]:
    return {name: np.array(array[at]) for name, array in base.items()}


def _chunk(tensors: Tensors) -> int:
    rows = _rows(tensors)
    per_row = sum(array.nbytes for array in tensors.values()) / rows if rows else 1
    return int(min(_CHUNK_ROWS, max(1, _CHUNK_BYTES // max(1.0, per_row))))


def _rows(tensors: Mapping[str, Tensor]) -> int:
    return len(next(iter(tensors.values()))) if tensors else 0
