"""scikit-learn's trees: every row takes its leaf, at thresholds too, in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parbake.contract.sources.sklearn import from_sklearn
from parbake.contract.tensors import Tensor
from tests.unit.contract.sources.agreement import answers, largest_gap, numbers, target

pytestmark = pytest.mark.needs("sklearn")

ensemble: Any = pytest.importorskip("sklearn.ensemble")
tree: Any = pytest.importorskip("sklearn.tree")
pipeline: Any = pytest.importorskip("sklearn.pipeline")
preprocessing: Any = pytest.importorskip("sklearn.preprocessing")

X = numbers(600)
Y = target(X)
THREE = np.array(["low", "middle", "high"])[np.digitize(Y, np.quantile(Y, [0.3, 0.7]))]
TWO = np.greater(Y, np.median(Y))
MORE = numbers(1500, seed=1)

EXACT: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "decision tree": (lambda: tree.DecisionTreeClassifier(max_depth=8), THREE),
    "extra tree": (lambda: tree.ExtraTreeClassifier(max_depth=8), TWO),
    "tree regressor": (tree.DecisionTreeRegressor, Y),
    "tree regressor of two targets": (
        lambda: tree.DecisionTreeRegressor(max_depth=7),
        np.stack([Y, -Y], axis=1),
    ),
    "forest": (lambda: ensemble.RandomForestClassifier(15, min_samples_leaf=3), THREE),
    "forest of booleans": (lambda: ensemble.RandomForestClassifier(15, max_depth=6), TWO),
    "forest of numbers": (lambda: ensemble.RandomForestClassifier(15, max_depth=6), TWO * 7 - 2),
    "forest of one class": (lambda: ensemble.RandomForestClassifier(3), np.zeros(len(Y), dtype=int)),
    "forest of workers": (lambda: ensemble.RandomForestClassifier(15, min_samples_leaf=3, n_jobs=2), THREE),
    "extra trees": (lambda: ensemble.ExtraTreesClassifier(10, max_depth=9), THREE),
    "forest regressor": (lambda: ensemble.RandomForestRegressor(15), Y),
    "forest regressor of two targets": (
        lambda: ensemble.RandomForestRegressor(10, max_depth=8),
        np.stack([Y, -Y], axis=1),
    ),
    "gradient boosting regressor": (lambda: ensemble.GradientBoostingRegressor(n_estimators=15), Y),
    "gradient boosting from zero": (
        lambda: ensemble.GradientBoostingRegressor(init="zero", n_estimators=15),
        Y,
    ),
    "histogram regressor": (lambda: ensemble.HistGradientBoostingRegressor(max_iter=15), Y),
    "histogram regressor with categories": (
        lambda: ensemble.HistGradientBoostingRegressor(max_iter=15, categorical_features=[5]),
        Y,
    ),
}

# The leaves are exact, the exponential after them may end in another last digit.
TO_A_DIGIT: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "gradient boosting": (lambda: ensemble.GradientBoostingClassifier(n_estimators=10), THREE),
    "gradient boosting of two": (lambda: ensemble.GradientBoostingClassifier(n_estimators=10), TWO),
    "gradient boosting, exponential": (
        lambda: ensemble.GradientBoostingClassifier(loss="exponential", n_estimators=10),
        TWO,
    ),
    "histogram": (lambda: ensemble.HistGradientBoostingClassifier(max_iter=10), THREE),
    "histogram of two": (lambda: ensemble.HistGradientBoostingClassifier(max_iter=10), TWO),
    "histogram poisson": (
        lambda: ensemble.HistGradientBoostingRegressor(loss="poisson", max_iter=10),
        np.abs(Y),
    ),
    "ada boost": (lambda: ensemble.AdaBoostClassifier(n_estimators=10), THREE),
    "ada boost of two": (
        lambda: ensemble.AdaBoostClassifier(tree.DecisionTreeClassifier(max_depth=3), n_estimators=5),
        TWO,
    ),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", EXACT)
def test_trees_answer_bit_for_bit_on_rows_and_at_thresholds(name: str, dtype: type[np.generic]) -> None:
    make, labels = EXACT[name]
    source = from_sklearn(make().fit(X.astype(dtype), labels), X[:100].astype(dtype))
    assert source.thresholds or name == "forest of one class"
    assert largest_gap(source, {"x": MORE.astype(dtype)}) == 0.0


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", TO_A_DIGIT)
def test_boosted_trees_answer_to_the_last_digit_of_an_exponential(name: str, dtype: type[np.generic]) -> None:
    make, labels = TO_A_DIGIT[name]
    source = from_sklearn(make().fit(X.astype(dtype), labels), X[:100].astype(dtype))
    assert largest_gap(source, {"x": MORE.astype(dtype)}) < 4e-15
    assert source.rtol is not None
    assert source.rtol <= 1e-12


def test_a_forest_behind_a_scaler_answers_every_row_bit_for_bit() -> None:
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), ensemble.RandomForestRegressor(30))
    source = from_sklearn(model.fit(X, Y), X)
    rows = numbers(4000, seed=2)
    np.testing.assert_array_equal(answers(source, {"x": rows})["prediction"], model.predict(rows))
    assert largest_gap(source, {"x": rows}) == 0.0
    assert {position for _, position in source.thresholds} == set(range(6))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ensemble.RandomForestClassifier(10, max_depth=8),
        lambda: ensemble.HistGradientBoostingRegressor(max_iter=10),
    ],
)
def test_missing_values_go_where_training_sent_them(make: Callable[[], Any]) -> None:
    def with_gaps(x: Tensor, seed: int) -> Tensor:
        return np.where(np.random.default_rng(seed).random(x.shape) < 0.15, np.nan, x)

    holed = with_gaps(X, 3)
    source = from_sklearn(make().fit(holed, np.round(Y)), holed[:100])
    assert source.inputs[0].allow_nan
    assert largest_gap(source, {"x": with_gaps(MORE, 4)}) < 4e-15


def test_whole_numbers_beyond_float32_are_rounded_once_as_scikit_learn_does() -> None:
    draw = np.random.default_rng(0)
    # Beside the midpoint of two float32: by way of a double they would be rounded to the other one.
    middle = (1 << 60) + (1 << 36)
    codes = draw.choice([middle - 1, middle, middle + 1, 1 << 60, (1 << 60) + (1 << 37)], size=(300, 1))
    model = tree.DecisionTreeRegressor().fit(
        codes, (codes.astype(np.float32)[:, 0] > np.float32(1 << 60)).astype(float)
    )
    source = from_sklearn(model, codes)
    np.testing.assert_array_equal(answers(source, {"x": codes})["prediction"], model.predict(codes))


def test_an_isolation_forest_scores_and_labels() -> None:
    model = ensemble.IsolationForest(
        n_estimators=20, contamination=0.1, max_features=0.5, random_state=0
    ).fit(X)
    source = from_sklearn(model, X[:100])
    assert [spec.name for spec in source.outputs] == ["label", "score"]
    assert largest_gap(source, {"x": MORE}) < 1e-14


def test_probabilities_carry_the_names_of_the_classes() -> None:
    source = from_sklearn(tree.DecisionTreeClassifier().fit(X, THREE), X[:10])
    label, probability = source.outputs
    assert (label.datatype, label.shape) == ("BYTES", ())
    assert (probability.datatype, probability.shape, probability.labels) == (
        "FP64",
        (3,),
        ("high", "low", "middle"),
    )
