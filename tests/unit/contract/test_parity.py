"""Parity: wrong conversions are found where they are wrong, right ones pass, and ties are told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract import parity
from parbake.contract.model import Step, TensorSpec, Tolerance
from parbake.contract.parity import answers_of, neighbours, prove, rounded_up, tolerance_for
from parbake.contract.sources.model import Source
from parbake.contract.tensors import Tensor, Tensors

Function = Callable[[Tensors], Mapping[str, Any]]

SCORE = TensorSpec("y", "FP64")
LABEL = TensorSpec("label", "INT64")


def source(
    predict: Function,
    example: Tensors,
    outputs: tuple[TensorSpec, ...] = (SCORE,),
    thresholds: Mapping[tuple[str, int], list[float]] | None = None,
    **more: Any,
) -> Source:
    """A Source of a numpy function."""
    names: dict[str, Any] = {
        "float32": "FP32",
        "float64": "FP64",
        "int64": "INT64",
        "object": "BYTES",
        "bool": "BOOL",
    }
    gaps = more.pop("allow_nan", False)
    inputs = tuple(
        TensorSpec(name, names[str(array.dtype)], tuple(array.shape[1:]), allow_nan=gaps)
        for name, array in example.items()
    )
    steps = (Step("onnx", "model.onnx"),)
    return Source(
        "numpy", "2", inputs, outputs, steps, {}, predict, example, thresholds=thresholds or {}, **more
    )


def uniform(rows: int = 200, width: int = 3) -> dict[str, Tensor]:
    """Rows far from any threshold that tests use."""
    return {"x": np.random.default_rng(0).uniform(-1000.0, 1000.0, size=(rows, width))}


def step_at(threshold: float) -> Function:
    """1 where the first column is above the threshold."""
    return lambda tensors: {"y": (tensors["x"][:, 0] > threshold).astype(np.float64)}


def test_a_threshold_rounded_to_float32_is_found_by_bisection_alone() -> None:
    # 1/3 is not a float32: between the two thresholds lie numbers that no example has.
    report = prove(source(step_at(1 / 3), uniform()), step_at(float(np.float32(1 / 3))), Tolerance())
    assert report.differing > 0
    assert report.max_abs_diff == 1.0
    assert not report.exact
    assert len(report.rows) <= parity.SHOWN
    assert str(report.rows[0]).startswith("x=[0.333333")
    assert ": y is " in str(report.rows[0])


def test_a_threshold_rounded_to_float32_is_found_where_the_source_names_it() -> None:
    # Two rows that agree: without the thresholds there is nothing to bisect between.
    example = {"x": np.array([[1.0], [2.0]])}
    wrong = step_at(float(np.float32(1 / 3)))
    assert prove(source(step_at(1 / 3), example), wrong, Tolerance()).differing == 0
    named = source(step_at(1 / 3), example, thresholds={("x", 0): [1 / 3]})
    assert prove(named, wrong, Tolerance()).differing > 0


def test_a_deep_branch_is_reached_by_moving_all_inputs_at_once() -> None:
    def inner(x: Tensor, last: float) -> Tensor:
        reached = (x[:, 0] > 0.25) & (x[:, 1] <= 0.5)
        return np.where(reached & (x[:, 2] > last), 1.0, 0.0)

    example = {"x": np.full((4, 3), -7.0)}
    thresholds = {("x", 0): [0.25], ("x", 1): [0.5], ("x", 2): [1 / 3]}
    named = source(lambda t: {"y": inner(t["x"], 1 / 3)}, example, thresholds=thresholds)
    report = prove(named, lambda t: {"y": inner(t["x"], float(np.float32(1 / 3)))}, Tolerance())
    assert report.differing > 0


def test_the_same_function_is_exact() -> None:
    report = prove(
        source(step_at(1 / 3), uniform(), thresholds={("x", 0): [1 / 3]}), step_at(1 / 3), Tolerance()
    )
    assert (report.differing, report.exact, report.max_abs_diff, report.left_out) == (0, True, 0.0, 0)
    assert report.example_rows == 200
    assert report.threshold_rows > 500
    assert report.tested == report.example_rows + report.threshold_rows


def test_the_same_seed_makes_the_same_rows() -> None:
    made = [prove(source(step_at(1 / 3), uniform()), step_at(0.34), Tolerance(), seed=4) for _ in range(2)]
    assert made[0] == made[1]


def linear(dtype: type[np.floating[Any]]) -> Function:
    """A linear classifier computed in one floating-point type: score and label."""
    weights = np.random.default_rng(1).normal(size=3)

    def predict(tensors: Tensors) -> dict[str, Tensor]:
        score = (tensors["x"].astype(dtype) @ weights.astype(dtype)).astype(np.float64)
        return {"y": score, "label": (score > 0).astype(np.int64)}

    return predict


def test_a_label_that_rounding_decides_is_a_tie_and_no_difference() -> None:
    tolerance = Tolerance(1e-4, 1e-3)
    report = prove(source(linear(np.float64), uniform(), (SCORE, LABEL)), linear(np.float32), tolerance)
    assert report.differing == 0
    assert report.ties > 0
    assert not report.exact


def test_without_scores_a_label_must_be_equal_unless_the_source_is_smooth() -> None:
    tolerance = Tolerance(1e-4, 1e-3)
    strict = prove(source(linear(np.float64), uniform(), (LABEL,)), linear(np.float32), tolerance)
    assert strict.differing > 0
    smooth = prove(
        source(linear(np.float64), uniform(), (LABEL,), smooth=True), linear(np.float32), tolerance
    )
    assert smooth.differing == 0
    assert smooth.ties > 0


def test_a_label_that_jumps_together_with_its_score_is_no_tie() -> None:
    def tree(threshold: float) -> Function:
        def predict(tensors: Tensors) -> dict[str, Tensor]:
            right = tensors["x"][:, 0] > threshold
            # The score barely moves: within the tolerance, but the label is the tree's and must be equal.
            return {"y": np.where(right, 0.9, 0.1), "label": right.astype(np.int64)}

        return predict

    report = prove(
        source(tree(1 / 3), uniform(), (SCORE, LABEL)), tree(float(np.float32(1 / 3))), Tolerance(0.0, 1e-6)
    )
    assert report.differing > 0
    assert report.ties == 0


def test_another_label_on_an_ordinary_row_is_no_tie() -> None:
    def swapped(tensors: Tensors) -> dict[str, Tensor]:
        answer = dict(linear(np.float64)(tensors))
        return {**answer, "label": 1 - answer["label"]}

    report = prove(source(linear(np.float64), uniform(50), (SCORE, LABEL)), swapped, Tolerance(1e-4, 1e-3))
    assert report.differing >= 49


def test_missing_values_are_tried_where_they_are_allowed() -> None:
    def left(tensors: Tensors) -> dict[str, Tensor]:
        return {"y": np.where(tensors["x"][:, 0] > 0, 1.0, 2.0)}

    def right(tensors: Tensors) -> dict[str, Tensor]:
        return {"y": np.where(tensors["x"][:, 0] <= 0, 2.0, 1.0)}

    assert prove(source(left, uniform()), right, Tolerance()).differing == 0
    assert prove(source(left, uniform(), allow_nan=True), right, Tolerance()).differing > 0


def test_unknown_and_empty_strings_are_tried() -> None:
    known = {"rome": 1.0, "oslo": 2.0}
    example = {"city": np.array(["rome", "oslo", "rome"], dtype=object)}
    zero = source(lambda t: {"y": np.array([known.get(c, 0.0) for c in t["city"]])}, example)
    report = prove(zero, lambda t: {"y": np.array([known.get(c, -1.0) for c in t["city"]])}, Tolerance())
    assert report.differing > 0
    assert "city=" in str(report.rows[0])


def test_whole_numbers_are_moved_by_one() -> None:
    example = {"n": np.array([[10], [20], [30]])}
    floor = source(lambda t: {"y": (t["n"][:, 0] > 20).astype(float)}, example)
    assert prove(floor, lambda t: {"y": (t["n"][:, 0] > 20.5).astype(float)}, Tolerance()).differing == 0
    assert prove(floor, lambda t: {"y": (t["n"][:, 0] > 22).astype(float)}, Tolerance()).differing > 0


def test_rows_that_the_source_refuses_are_left_out_and_counted() -> None:
    def picky(tensors: Tensors) -> dict[str, Tensor]:
        if (tensors["x"][:, 0] < -900).any():
            raise ValueError("too cold")
        return {"y": tensors["x"][:, 0]}

    example = uniform()
    cold = int((example["x"][:, 0] < -900).sum())
    report = prove(source(picky, example), lambda t: {"y": t["x"][:, 0]}, Tolerance())
    assert cold > 0
    assert report.example_rows == 200 - cold
    assert report.left_out >= cold
    assert report.refusal == "too cold"
    assert report.differing == 0


def test_a_row_that_only_the_bundle_refuses_is_a_difference() -> None:
    def fails(tensors: Tensors) -> dict[str, Tensor]:
        if (tensors["x"][:, 0] > 900).any():
            raise RuntimeError("no kernel for that")
        return {"y": tensors["x"][:, 0]}

    report = prove(source(lambda t: {"y": t["x"][:, 0]}, uniform()), fails, Tolerance())
    assert report.differing > 0
    assert report.rows[0].got == "an error: no kernel for that"


def test_nothing_converted_is_compared_on_the_example_only() -> None:
    report = prove(source(step_at(1 / 3), uniform(), own_runtime=True), step_at(1 / 3), Tolerance())
    assert (report.example_rows, report.threshold_rows) == (200, 0)


def test_a_wrong_shape_is_a_difference() -> None:
    wide = TensorSpec("y", "FP64", (-1,))
    report = prove(
        source(lambda t: {"y": t["x"]}, uniform(5), (wide,)), lambda t: {"y": t["x"][:, :2]}, Tolerance()
    )
    assert report.differing == 5


@pytest.mark.parametrize(
    ("values", "asked", "expected"),
    [
        (np.array([0.5, 0.25], dtype=np.float32), None, Tolerance(1e-5, 1e-6)),
        (np.array([2000.0, 5000.0], dtype=np.float32), None, Tolerance(1e-5, 1e-2)),
        (np.array([5000.0], dtype=np.float32), Tolerance(0.5, 0.25), Tolerance(0.5, 0.25)),
    ],
)
def test_the_tolerance_is_what_was_asked_for_or_fits_the_answers(
    values: Tensor, asked: Tolerance | None, expected: Tolerance
) -> None:
    named = source(lambda t: {"y": t["x"]}, {"x": values}, (TensorSpec("y", "FP32"),))
    assert tolerance_for(named, asked) == expected


def test_a_source_that_promises_exactness_is_held_to_it() -> None:
    named = source(lambda t: {"y": t["x"]}, {"x": np.ones(3)}, rtol=0.0, atol=0.0)
    assert tolerance_for(named) == Tolerance(0.0, 0.0)
    labels = source(lambda t: {"label": t["x"]}, {"x": np.ones(3)}, (LABEL,))
    assert tolerance_for(labels) == Tolerance(0.0, 0.0)


@given(st.floats(-1e30, 1e30), st.sampled_from(["FP32", "FP64", "FP16"]))
def test_the_neighbours_of_a_threshold_lie_on_both_sides_of_it(value: float, datatype: str) -> None:
    found = neighbours(value, datatype)
    assert np.isfinite(found).all()
    if datatype == "FP64":
        for wanted in (value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf)):
            assert wanted in found
    if abs(value) < 6e4 or datatype != "FP16":
        exact = found.astype(np.float64)
        assert (exact <= value).any()
        assert (exact >= value).any()


@given(st.floats(-1e6, 1e6))
def test_whole_neighbours_are_the_whole_numbers_around(value: float) -> None:
    found = neighbours(value, "INT32").tolist()
    assert {math.floor(value), math.ceil(value)} <= set(found)
    assert len(found) >= 3


@given(st.floats(1e-300, 1e300))
def test_a_difference_is_shown_with_two_digits_and_never_smaller(value: float) -> None:
    shown = rounded_up(value)
    assert value * (1 - 1e-9) <= shown <= value * 1.11
    assert f"{shown:.1e}" == f"{float(f'{shown:.1e}'):.1e}"


@given(st.sets(st.integers(0, 39)))
def test_a_bad_row_spoils_no_other(bad: set[int]) -> None:
    def run(tensors: Tensors) -> dict[str, Tensor]:
        if set(tensors["x"].tolist()) & bad:
            raise ValueError("bad row")
        return {"y": tensors["x"] * 2.0}

    answers, answered, said = answers_of(run, {"x": np.arange(40)}, (SCORE,))
    assert set(np.flatnonzero(~answered).tolist()) == bad
    assert answers["y"][answered].tolist() == [2.0 * i for i in range(40) if i not in bad]
    assert bool(said) == bool(bad)
