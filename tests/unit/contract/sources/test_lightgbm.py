"""LightGBM: thresholds in double, its kinds of missing values, categories, objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parbake.contract.sources.lightgbm import from_lightgbm
from parbake.contract.sources.sklearn import from_sklearn
from parbake.contract.tensors import Tensor
from parbake.errors import NotConvertible
from tests.unit.contract.sources.agreement import answers, largest_gap, numbers, target

pytestmark = pytest.mark.needs("lightgbm", "sklearn", "pandas")

lgb: Any = pytest.importorskip("lightgbm")
pd: Any = pytest.importorskip("pandas")

SMALL: dict[str, Any] = {"n_estimators": 12, "min_data_in_leaf": 5, "verbose": -1, "num_threads": 1}


def holed(x: Tensor, seed: int) -> Tensor:
    """Some zeros in column 0 and some NaN in columns 1 and 3."""
    draw = np.random.default_rng(seed)
    out = x.copy()
    out[draw.random(len(x)) < 0.3, 0] = 0.0
    out[draw.random(len(x)) < 0.1, 1] = np.nan
    out[draw.random(len(x)) < 0.1, 3] = np.nan
    return out


def strange(x: Tensor) -> Tensor:
    """The rows, and some with values that training never saw."""
    values = [
        np.inf,
        -np.inf,
        np.nan,
        0.0,
        -0.0,
        1e-36,
        -1e-36,
        1e-35,
        -1.0000000180025095e-35,
        1e300,
        -1e300,
    ]
    values += [-0.5, -1.0, 3.7, 99.0, 1e10, 2.0**31]
    rows = np.repeat(x[:6], len(values) * 6, axis=0)
    for i in range(len(rows)):
        rows[i, i % 6] = values[(i // 6) % len(values)]
    return np.concatenate([x, rows, np.full((1, 6), np.nan), np.zeros((1, 6))])


X = holed(numbers(600), 0)
Y = target(numbers(600))
THREE = np.array(["low", "middle", "high"])[np.digitize(Y, np.quantile(Y, [0.3, 0.7]))]
TWO = (np.greater(Y, np.median(Y))).astype(int)
MORE = strange(holed(numbers(800, seed=1), 1))
FOREST: dict[str, Any] = {"boosting_type": "rf", "subsample": 0.6, "subsample_freq": 1}

EXACT: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "regression": (lambda: lgb.LGBMRegressor(**SMALL), Y),
    "absolute": (lambda: lgb.LGBMRegressor(objective="l1", **SMALL), Y),
    "square root": (lambda: lgb.LGBMRegressor(reg_sqrt=True, **SMALL), Y),
    "quantile": (lambda: lgb.LGBMRegressor(objective="quantile", **SMALL), Y),
    "huber": (lambda: lgb.LGBMRegressor(objective="huber", **SMALL), Y),
    "forest": (lambda: lgb.LGBMRegressor(**FOREST, **SMALL), Y),
    "dart": (lambda: lgb.LGBMRegressor(boosting_type="dart", **SMALL), Y),
    "zero is missing": (lambda: lgb.LGBMRegressor(zero_as_missing=True, **SMALL), Y),
    "nothing is missing": (lambda: lgb.LGBMRegressor(use_missing=False, **SMALL), Y),
    "no split": (lambda: lgb.LGBMRegressor(**{**SMALL, "min_data_in_leaf": 5000}), Y),
}

TO_A_DIGIT: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "poisson": (lambda: lgb.LGBMRegressor(objective="poisson", **SMALL), np.abs(Y)),
    "gamma": (lambda: lgb.LGBMRegressor(objective="gamma", **SMALL), np.abs(Y) + 0.1),
    "tweedie": (lambda: lgb.LGBMRegressor(objective="tweedie", **SMALL), np.abs(Y)),
    "cross entropy": (lambda: lgb.LGBMRegressor(objective="cross_entropy", **SMALL), TWO * 0.9),
    "binary": (lambda: lgb.LGBMClassifier(**SMALL), TWO),
    "binary, steep": (lambda: lgb.LGBMClassifier(sigmoid=2.5, **SMALL), THREE == "low"),
    "binary forest": (lambda: lgb.LGBMClassifier(**FOREST, **SMALL), TWO),
    "multiclass": (lambda: lgb.LGBMClassifier(**SMALL), THREE),
    "one against all": (lambda: lgb.LGBMClassifier(objective="multiclassova", sigmoid=1.7, **SMALL), THREE),
    "multiclass forest": (lambda: lgb.LGBMClassifier(**FOREST, **SMALL), THREE),
}


@pytest.mark.parametrize("name", EXACT)
def test_scores_are_bit_for_bit_on_rows_thresholds_and_strange_values(name: str) -> None:
    make, labels = EXACT[name]
    source = from_lightgbm(make().fit(X, labels), X[:100])
    assert source.inputs[0].allow_nan
    assert largest_gap(source, {"x": MORE}) == 0.0


@pytest.mark.parametrize("name", TO_A_DIGIT)
def test_objectives_agree_to_the_last_digit_of_an_exponential(name: str) -> None:
    make, labels = TO_A_DIGIT[name]
    source = from_lightgbm(make().fit(X, labels), X[:100])
    assert largest_gap(source, {"x": MORE}) < 4e-15


def test_unix_timestamps_keep_their_milliseconds_on_every_row() -> None:
    x = numbers(2000)
    seconds = x[:, 4] - x[:, 4].min()
    labels = np.floor(seconds / 40) % 2
    model = lgb.LGBMClassifier(n_estimators=60, num_leaves=63, verbose=-1, num_threads=1).fit(x, labels)
    source = from_lightgbm(model, x)
    rows = numbers(4000, seed=5)
    cuts, times = np.asarray(source.thresholds[("x", 4)]), rows[:, 4, np.newaxis]
    moved = (times <= cuts) != (times <= cuts.astype(np.float32).astype(np.float64))
    assert moved.any(axis=1).sum() > 20, "with thresholds in float32 these rows would take other leaves"
    assert answers(source, {"x": rows})["label"].tolist() == model.predict(rows).tolist()
    assert largest_gap(source, {"x": rows}) < 1e-15


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_categories_are_read_as_lightgbm_reads_them(dtype: type[np.generic]) -> None:
    x = np.nan_to_num(X).astype(dtype)
    parameters = {"max_cat_to_onehot": 1, "cat_smooth": 1, "min_data_per_group": 1, **SMALL}
    model = lgb.LGBMRegressor(**parameters).fit(x, x[:, 5].astype(int) % 3 + Y / 5, categorical_feature=[5])
    assert "num_cat=0" not in model.booster_.model_to_string().split("Tree=1")[0]
    source = from_lightgbm(model, x[:100])
    with np.errstate(over="ignore"):
        assert largest_gap(source, {"x": MORE.astype(dtype)}) == 0.0


def people(x: Tensor, seed: int) -> Any:
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(x[:, :4], columns=list("abcd"))
    frame["code"] = x[:, 5].astype(int)
    frame["word"] = draw.choice(["x", "y", "zed", "q"], len(x))
    return frame


def test_columns_of_categories_of_a_frame_are_sent_as_strings() -> None:
    frame, more = people(X, 0), people(holed(numbers(600, seed=1), 1), 1)
    more.loc[:30, "word"] = "never seen"
    model = lgb.LGBMClassifier(**SMALL).fit(frame.astype({"word": "category"}), THREE)
    by_dtype = from_lightgbm(model, frame.astype({"word": "category"}).head(100))
    # A CSV file has no categories: the model itself says that its text column is one.
    by_model = from_lightgbm(model, frame.head(100))
    tensors = {name: more[name].to_numpy(object if name == "word" else None).reshape(-1, 1) for name in more}
    for source in (by_dtype, by_model):
        assert [spec.datatype for spec in source.inputs] == ["FP64"] * 4 + ["INT64", "BYTES"]
        assert largest_gap(source, tensors) < 4e-15
    mapping = from_lightgbm(model, {name: frame[name].to_numpy() for name in frame})
    assert largest_gap(mapping) < 4e-15


def test_whole_numbers_of_an_array_lose_digits_as_in_lightgbm_and_those_of_a_frame_do_not() -> None:
    x = np.nan_to_num(X).astype(np.int64)
    for example, rows in ((x, x), (pd.DataFrame(x, columns=list("abcdef")), x)):
        model = lgb.LGBMRegressor(**SMALL).fit(example, Y)
        source = from_lightgbm(model, example)
        assert source.inputs[0].datatype == "INT64"
        assert largest_gap(source, {"x": rows}) == 0.0


def test_a_booster_stops_at_its_best_iteration() -> None:
    data, check = lgb.Dataset(X[:400], Y[:400]), lgb.Dataset(X[400:], Y[400:])
    stop = lgb.early_stopping(2, verbose=False)
    parameters = {"objective": "regression", "verbose": -1, "num_threads": 1, "learning_rate": 0.5}
    booster = lgb.train(parameters, data, 100, valid_sets=[check], callbacks=[stop])
    assert booster.best_iteration < 100
    source = from_lightgbm(booster, X[:100])
    assert [spec.name for spec in source.outputs] == ["prediction"]
    assert largest_gap(source, {"x": MORE}) == 0.0


def test_lightgbm_may_be_the_last_step_of_a_pipeline() -> None:
    pipeline: Any = pytest.importorskip("sklearn.pipeline")
    preprocessing: Any = pytest.importorskip("sklearn.preprocessing")
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), lgb.LGBMClassifier(**SMALL))
    source = from_sklearn(model.fit(np.nan_to_num(X), THREE), np.nan_to_num(X)[:100])
    assert largest_gap(source, {"x": np.nan_to_num(MORE[:800])}) < 4e-15
    assert source.thresholds


def test_linear_trees_are_refused() -> None:
    model = lgb.LGBMRegressor(linear_tree=True, **SMALL).fit(np.nan_to_num(X), Y)
    with pytest.raises(NotConvertible, match="linear trees"):
        from_lightgbm(model, X[:10])


def test_an_objective_that_is_not_known_is_refused_with_what_to_do_instead() -> None:
    model = lgb.LGBMRegressor(objective="cross_entropy_lambda", **SMALL).fit(np.nan_to_num(X), Y > 0)
    with pytest.raises(NotConvertible, match="objective cross_entropy_lambda is not known here") as caught:
        from_lightgbm(model, X[:10])
    assert caught.value.hint == "pack a module:function that calls it"


def test_an_example_of_another_width_is_refused() -> None:
    model = lgb.LGBMRegressor(**SMALL).fit(X, Y)
    with pytest.raises(NotConvertible, match="trained on 6 columns, the example has 5"):
        from_lightgbm(model, X[:10, :5])
