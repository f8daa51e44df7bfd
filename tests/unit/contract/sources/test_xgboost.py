"""XGBoost: float32 from the cast to the sum, and margins that start where XGBoost starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parbake.contract.sources.sklearn import from_sklearn
from parbake.contract.sources.xgboost import from_xgboost
from parbake.contract.tensors import Tensor
from parbake.errors import NotConvertible
from tests.unit.contract.sources.agreement import largest_gap, numbers, target

pytestmark = pytest.mark.needs("xgboost", "sklearn", "pandas")

xgb: Any = pytest.importorskip("xgboost")
pd: Any = pytest.importorskip("pandas")

SMALL: dict[str, Any] = {"n_estimators": 12, "max_depth": 5, "n_jobs": 1}


def holed(x: Tensor, seed: int) -> Tensor:
    """Some zeros in column 0 and some NaN in columns 1 and 3."""
    draw = np.random.default_rng(seed)
    out = x.copy()
    out[draw.random(len(x)) < 0.3, 0] = 0.0
    out[draw.random(len(x)) < 0.1, 1] = np.nan
    out[draw.random(len(x)) < 0.1, 3] = np.nan
    return out


X = holed(numbers(600), 0)
Y = target(numbers(600))
THREE = np.digitize(Y, np.quantile(Y, [0.3, 0.7]))
TWO = (np.greater(Y, np.quantile(Y, 0.35))).astype(int)
MORE = np.concatenate([holed(numbers(800, seed=1), 1), np.full((1, 6), np.nan), np.zeros((1, 6))])

EXACT: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "regression": (lambda: xgb.XGBRegressor(**SMALL), Y),
    "absolute": (lambda: xgb.XGBRegressor(objective="reg:absoluteerror", **SMALL), Y),
    "pseudo-huber": (lambda: xgb.XGBRegressor(objective="reg:pseudohubererror", **SMALL), Y),
    "quantiles": (
        lambda: xgb.XGBRegressor(objective="reg:quantileerror", quantile_alpha=np.array([0.1, 0.9]), **SMALL),
        Y,
    ),
    "two targets": (lambda: xgb.XGBRegressor(**SMALL), np.stack([Y, -Y], axis=1)),
    "base score given": (lambda: xgb.XGBRegressor(base_score=3.25, **SMALL), Y),
    "forest": (lambda: xgb.XGBRFRegressor(n_estimators=12, n_jobs=1), Y),
    "several trees a round": (lambda: xgb.XGBRegressor(num_parallel_tree=3, subsample=0.7, **SMALL), Y),
    "zero is missing": (lambda: xgb.XGBRegressor(missing=0.0, **SMALL), Y),
    "by loss": (lambda: xgb.XGBRegressor(grow_policy="lossguide", max_leaves=9, **SMALL), Y),
}

TO_SOME_DIGITS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "logistic": (lambda: xgb.XGBClassifier(**SMALL), TWO),
    "logistic, base score given": (lambda: xgb.XGBClassifier(base_score=0.2, **SMALL), TWO),
    "softprob": (lambda: xgb.XGBClassifier(**SMALL), THREE),
    "softmax": (lambda: xgb.XGBClassifier(objective="multi:softmax", **SMALL), THREE),
    "poisson": (lambda: xgb.XGBRegressor(objective="count:poisson", **SMALL), np.abs(Y)),
    "gamma": (lambda: xgb.XGBRegressor(objective="reg:gamma", **SMALL), np.abs(Y) + 0.1),
    "tweedie": (lambda: xgb.XGBRegressor(objective="reg:tweedie", **SMALL), np.abs(Y)),
    "classes of a forest": (lambda: xgb.XGBRFClassifier(n_estimators=12, n_jobs=1), THREE),
    "dart": (lambda: xgb.XGBRegressor(booster="dart", rate_drop=0.3, **SMALL), Y),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", EXACT)
def test_margins_are_bit_for_bit_on_rows_and_at_thresholds(name: str, dtype: type[np.generic]) -> None:
    make, labels = EXACT[name]
    source = from_xgboost(make().fit(X, labels), X[:100].astype(dtype))
    assert source.inputs[0].allow_nan
    assert source.thresholds
    assert largest_gap(source, {"x": MORE.astype(dtype)}) == 0.0


@pytest.mark.parametrize("name", TO_SOME_DIGITS)
def test_objectives_agree_to_the_last_digits_of_a_float32_exponential(name: str) -> None:
    make, labels = TO_SOME_DIGITS[name]
    source = from_xgboost(make().fit(X, labels), X[:100])
    gap = largest_gap(source, {"x": MORE})
    assert gap < 1e-5 if name in ("poisson", "gamma", "tweedie", "dart") else gap < 3e-7
    assert (source.rtol, source.atol) == (1e-6, 1e-6)


@pytest.mark.parametrize("share", [0.1, 0.314, 0.5, 0.77])
def test_sums_start_from_the_logit_that_xgboost_itself_takes(share: float) -> None:
    labels = (np.arange(len(X)) < share * len(X)).astype(int)
    # Margins are answered as they are, so that nothing hides the start of the sum.
    parameters = {"objective": "binary:logitraw", "max_depth": 3, "nthread": 1}
    booster = xgb.train(parameters, xgb.DMatrix(X, labels), 8)
    assert largest_gap(from_xgboost(booster, X[:10]), {"x": MORE}) == 0.0


def test_estimators_stop_at_their_best_iteration_and_boosters_do_not() -> None:
    model = xgb.XGBRegressor(early_stopping_rounds=2, n_estimators=200, learning_rate=0.8, n_jobs=1)
    model.fit(X[:400], Y[:400], eval_set=[(X[400:], Y[400:])], verbose=False)
    assert model.best_iteration + 1 < model.get_booster().num_boosted_rounds()
    for one in (model, model.get_booster()):
        assert largest_gap(from_xgboost(one, X[:10]), {"x": MORE}) == 0.0


def test_a_frame_keeps_its_names_and_whole_numbers_are_rounded_once() -> None:
    frame = pd.DataFrame(
        {"a": X[:, 0], "big": (X[:, 4] * 1e9).astype(np.int64), "code": X[:, 5].astype(np.int32)}
    )
    source = from_xgboost(xgb.XGBRegressor(**SMALL).fit(frame, Y), frame[["code", "big", "a"]].head(300))
    assert [(spec.name, spec.datatype) for spec in source.inputs] == [
        ("a", "FP64"),
        ("big", "INT64"),
        ("code", "INT32"),
    ]
    assert largest_gap(source) == 0.0


def test_what_a_sparse_encoder_leaves_out_is_missing_to_xgboost() -> None:
    compose: Any = pytest.importorskip("sklearn.compose")
    pipeline: Any = pytest.importorskip("sklearn.pipeline")
    preprocessing: Any = pytest.importorskip("sklearn.preprocessing")
    x, more = np.nan_to_num(X), np.nan_to_num(MORE)
    columns = [("a", preprocessing.OneHotEncoder(), [5]), ("b", preprocessing.MaxAbsScaler(), [0, 3])]
    for threshold in (0.0, 1.0):
        encoder = compose.ColumnTransformer(columns, sparse_threshold=threshold)
        model = pipeline.make_pipeline(encoder, xgb.XGBRegressor(**SMALL)).fit(x, Y)
        assert largest_gap(from_sklearn(model, x[:100]), {"x": more}) == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: xgb.XGBRegressor(booster="gblinear", n_estimators=2), "gblinear has no trees"),
        (lambda: xgb.XGBRegressor(multi_strategy="multi_output_tree", **SMALL), "multi_output_tree"),
    ],
)
def test_boosters_without_an_exact_conversion_are_refused_by_name(
    make: Callable[[], Any], words: str
) -> None:
    labels = np.stack([Y, -Y], axis=1) if "output" in words else Y
    with pytest.raises(NotConvertible, match=words):
        from_xgboost(make().fit(np.nan_to_num(X), labels), X[:10])


def test_categories_are_refused_with_what_to_do_instead() -> None:
    frame = pd.DataFrame({"a": X[:, 0], "word": np.array(["x", "y", "zed"])[X[:, 5].astype(int) % 3]})
    frame["word"] = frame["word"].astype("category")
    model = xgb.XGBRegressor(enable_categorical=True, **SMALL).fit(frame, X[:, 5] % 3)
    with pytest.raises(NotConvertible, match="categories") as caught:
        from_xgboost(model, frame.head(10))
    assert "OneHotEncoder" in caught.value.hint
    # A pickle of this model is not taken, so nobody should be sent that way.
    assert "pickle" not in caught.value.hint
    assert caught.value.hint.endswith("or pack a module:function that calls it")
