"""Preprocessing in front of trees and linear models, number by number as scikit-learn computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parbake.contract.sources.model import Source
from parbake.contract.sources.sklearn import from_sklearn
from parbake.contract.tensors import Tensor
from parbake.errors import NotConvertible, PackRefused
from tests.unit.contract.sources.agreement import answers, largest_gap, numbers, target

pytestmark = pytest.mark.needs("sklearn", "pandas")

compose: Any = pytest.importorskip("sklearn.compose")
decomposition: Any = pytest.importorskip("sklearn.decomposition")
ensemble: Any = pytest.importorskip("sklearn.ensemble")
impute: Any = pytest.importorskip("sklearn.impute")
linear: Any = pytest.importorskip("sklearn.linear_model")
pd: Any = pytest.importorskip("pandas")
pipeline: Any = pytest.importorskip("sklearn.pipeline")
pre: Any = pytest.importorskip("sklearn.preprocessing")
selection: Any = pytest.importorskip("sklearn.feature_selection")

X = numbers(600)
Y = target(X)
MORE = numbers(1200, seed=1)

EXACT: dict[str, Callable[[], Any]] = {
    "standard": pre.StandardScaler,
    "standard without mean": lambda: pre.StandardScaler(with_mean=False),
    "min-max": lambda: pre.MinMaxScaler((-1, 3)),
    "min-max, clipped": lambda: pre.MinMaxScaler(clip=True),
    "max-abs": pre.MaxAbsScaler,
    "robust": pre.RobustScaler,
    "largest": lambda: pre.Normalizer("max"),
    "binary": lambda: pre.Binarizer(threshold=0.5),
    "products": lambda: pre.PolynomialFeatures(3),
    "interactions": lambda: pre.PolynomialFeatures(2, interaction_only=True, include_bias=False),
    "best": lambda: selection.SelectKBest(selection.f_regression, k=3),
    "varied": lambda: selection.VarianceThreshold(1e-30),
    "bins": lambda: pipeline.make_pipeline(
        pre.StandardScaler(), pre.KBinsDiscretizer(5, quantile_method="averaged_inverted_cdf")
    ),
    "ordinal bins": lambda: pipeline.make_pipeline(
        pre.StandardScaler(), pre.KBinsDiscretizer(5, encode="ordinal", strategy="uniform")
    ),
    "as it is": pre.FunctionTransformer,
    "absolute": lambda: pre.FunctionTransformer(np.abs),
    "imputed": impute.SimpleImputer,
    "scaled twice": lambda: pipeline.make_pipeline(pre.StandardScaler(), pre.MinMaxScaler()),
    "union": lambda: pipeline.FeatureUnion(
        [("a", pre.StandardScaler()), ("b", pre.MaxAbsScaler()), ("c", "drop")],
        transformer_weights={"b": 2.5},
    ),
    "columns": lambda: compose.ColumnTransformer(
        [("a", pre.StandardScaler(), [0, 1]), ("b", "passthrough", [3]), ("c", "drop", [2])],
        remainder=pre.MinMaxScaler(),
    ),
    "columns by mask and slice, weighted": lambda: compose.ColumnTransformer(
        [("a", pre.StandardScaler(), np.array([True, False] * 3)), ("b", pre.RobustScaler(), slice(1, 3))],
        transformer_weights={"b": 2.5},
    ),
    "sparse columns": lambda: compose.ColumnTransformer(
        [("a", pre.OneHotEncoder(), [5]), ("b", pre.MaxAbsScaler(), [0])], sparse_threshold=1.0
    ),
    "nested": lambda: compose.ColumnTransformer(
        [("a", pipeline.make_pipeline(pre.StandardScaler(), pre.PolynomialFeatures(2)), [0, 1])],
        remainder="passthrough",
    ),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", EXACT)
def test_preprocessing_is_bit_for_bit_alone_and_in_front_of_a_forest(
    name: str, dtype: type[np.generic]
) -> None:
    x, more = X.astype(dtype), {"x": MORE.astype(dtype)}
    step = EXACT[name]().fit(x, Y)
    assert largest_gap(from_sklearn(step, x[:100]), more) == 0.0
    model = pipeline.make_pipeline(EXACT[name](), ensemble.RandomForestRegressor(8, max_depth=9)).fit(x, Y)
    assert largest_gap(from_sklearn(model, x[:100]), more) == 0.0


ROUNDED: dict[str, Callable[[], Any]] = {
    "length": pre.Normalizer,
    "principal components": lambda: decomposition.PCA(3),
    "whitened": lambda: decomposition.PCA(2, whiten=True),
    "singular values": lambda: decomposition.TruncatedSVD(3),
    "yeo-johnson": pre.PowerTransformer,
    "box-cox": lambda: pipeline.make_pipeline(pre.MinMaxScaler((1, 2)), pre.PowerTransformer("box-cox")),
    "logarithm": lambda: pipeline.make_pipeline(pre.MinMaxScaler((1, 2)), pre.FunctionTransformer(np.log)),
    "quantiles (skl2onnx)": lambda: pre.QuantileTransformer(n_quantiles=20),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_sums_and_powers_agree_to_their_last_digits(name: str) -> None:
    x, more = np.delete(X, 2, axis=1), np.delete(MORE, 2, axis=1)
    source = from_sklearn(ROUNDED[name]().fit(x), x[:100])
    got, expected = answers(source, {"x": more}), source.predict({"x": more})
    assert source.rtol is not None
    assert source.atol is not None
    gap = np.abs(got["transformed"] - expected["transformed"])
    assert (gap <= source.atol + source.rtol * np.abs(expected["transformed"])).all()


def test_trees_behind_sums_in_float32_are_refused_because_rounding_would_move_rows() -> None:
    x = X.astype(np.float32)
    model = pipeline.make_pipeline(pre.Normalizer(), ensemble.RandomForestRegressor(3)).fit(x, Y)
    with pytest.raises(NotConvertible, match="trees behind Normalizer in float32"):
        from_sklearn(model, x[:10])
    assert largest_gap(from_sklearn(model.fit(X, Y), X[:10]), {"x": MORE}) == 0.0


# Frames of strings and numbers

CITIES = ["basel", "fribourg", "zürich", "a city with spaces"]


def people(rows: int, seed: int, *, gaps: bool = False) -> Any:
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": draw.integers(18, 90, rows),
            "income": np.round(np.exp(draw.normal(10, 1, rows)), 2),
            "city": draw.choice(CITIES, rows),
            "job": draw.choice(
                [f"job {i}" for i in range(30)], rows, p=np.r_[np.full(5, 0.18), np.full(25, 0.004)]
            ),
            "since": 1.7e9 + draw.random(rows) * 1e7,
            "member": draw.random(rows) < 0.5,
            "note": draw.choice(["p", "q"], rows),
        }
    )
    if gaps:
        frame.loc[draw.random(rows) < 0.2, "income"] = np.nan
        frame.loc[draw.random(rows) < 0.2, "city"] = np.nan
    return frame


def columns_of(frame: Any, source: Source) -> dict[str, Tensor]:
    """The frame as the source's inputs; missing strings are empty."""
    texts = {spec.name for spec in source.inputs if spec.datatype == "BYTES"}
    return {
        spec.name: (
            frame[spec.name].fillna("").to_numpy(object)
            if spec.name in texts
            else frame[spec.name].to_numpy()
        ).reshape(-1, 1)
        for spec in source.inputs
    }


def spends(frame: Any) -> Tensor:
    income = np.nan_to_num(frame["income"].to_numpy(float))
    score = income / 1e4 + frame["age"] / 30 + (frame["city"] == "basel") + (frame["since"] - 1.7e9) / 1e7
    return np.where(score > score.median(), "yes", "no")


def encoder(*, indicator: bool = False) -> Any:
    numeric = pipeline.make_pipeline(impute.SimpleImputer(add_indicator=indicator), pre.StandardScaler())
    texts = pipeline.make_pipeline(
        impute.SimpleImputer(strategy="most_frequent"), pre.OneHotEncoder(handle_unknown="ignore")
    )
    return compose.ColumnTransformer(
        [
            ("numbers", numeric, ["age", "income", "since"]),
            ("city", texts, ["city"]),
            ("job", pre.OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=20), ["job"]),
            ("member", "passthrough", ["member"]),
        ]
    )


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("last", ["forest", "logistic regression", "histogram"])
def test_strings_and_numbers_go_through_as_in_scikit_learn(last: str, gaps: bool) -> None:
    final = {
        "forest": lambda: ensemble.RandomForestClassifier(15, max_depth=8),
        "logistic regression": lambda: linear.LogisticRegression(max_iter=300),
        "histogram": lambda: ensemble.HistGradientBoostingClassifier(max_iter=10),
    }[last]()
    frame = people(500, 0, gaps=gaps)
    model = pipeline.make_pipeline(encoder(indicator=gaps), final).fit(frame, spends(frame))
    source = from_sklearn(model, frame.head(200))
    assert [spec.name for spec in source.inputs] == ["age", "income", "city", "job", "since", "member"]
    more = people(1000, 1, gaps=gaps)
    more.loc[:20, "city"] = "nowhere"
    more.loc[10:40, "job"] = "never seen"
    tensors = columns_of(more, source)
    assert largest_gap(source, tensors) <= (0.0 if last == "forest" else 1e-12)


def test_columns_that_the_pipeline_drops_are_not_asked_for() -> None:
    frame = people(200, 0)
    model = pipeline.make_pipeline(encoder(), linear.LogisticRegression(max_iter=300)).fit(
        frame, spends(frame)
    )
    source = from_sklearn(model, frame.drop(columns="note").head(50))
    assert "note" not in [spec.name for spec in source.inputs]
    assert largest_gap(source) < 1e-12
    with pytest.raises(PackRefused, match="the example lacks 'city'"):
        from_sklearn(model, frame.drop(columns="city").head(50))


def test_dropped_columns_of_a_frame_of_numbers_are_left_out_of_its_matrix() -> None:
    frame = pd.DataFrame(X, columns=list("abcdef"))
    chosen = [("s", pre.StandardScaler(), ["f", "a"]), ("p", "passthrough", ["d"])]
    model = pipeline.make_pipeline(compose.ColumnTransformer(chosen), ensemble.RandomForestRegressor(5))
    source = from_sklearn(model.fit(frame, Y), frame.head(50))
    assert source.inputs[0].columns == ("a", "d", "f")
    assert largest_gap(source, {"x": MORE[:, [0, 3, 5]]}) == 0.0


def test_missing_values_are_accepted_where_they_are_imputed_and_nowhere_else() -> None:
    frame = people(200, 0)
    model = pipeline.make_pipeline(encoder(), linear.LogisticRegression(max_iter=300)).fit(
        frame, spends(frame)
    )
    source = from_sklearn(model, frame.head(50))
    assert [spec.name for spec in source.inputs if spec.allow_nan] == ["income", "since"]


ENCODERS: dict[str, Callable[[], Any]] = {
    "one-hot": lambda: pre.OneHotEncoder(handle_unknown="ignore"),
    "dense one-hot": lambda: pre.OneHotEncoder(
        sparse_output=False, dtype=np.float32, handle_unknown="ignore"
    ),
    "first dropped": lambda: pre.OneHotEncoder(drop="first", handle_unknown="ignore"),
    "binary dropped": lambda: pre.OneHotEncoder(drop="if_binary", handle_unknown="ignore"),
    "rare together": lambda: pre.OneHotEncoder(min_frequency=30, handle_unknown="infrequent_if_exist"),
    "rare together, first dropped": lambda: pre.OneHotEncoder(
        min_frequency=30, drop="first", handle_unknown="infrequent_if_exist"
    ),
    "rare together, unknown ignored": lambda: pre.OneHotEncoder(max_categories=4, handle_unknown="ignore"),
    "ordinal": lambda: pre.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-7),
    "ordinal, unknown missing": lambda: pre.OrdinalEncoder(
        handle_unknown="use_encoded_value", unknown_value=np.nan
    ),
    "ordinal, rare together": lambda: pre.OrdinalEncoder(
        handle_unknown="use_encoded_value", unknown_value=-1, min_frequency=30
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_light_the_same_columns_for_known_and_unknown_categories(name: str) -> None:
    frame = people(400, 0)[["city", "job", "note", "member"]]
    frame["code"] = frame["city"].map(len) * 3
    source = from_sklearn(ENCODERS[name]().fit(frame), frame.head(50))
    more = people(400, 1)[["city", "job", "note", "member"]]
    more["code"] = more["city"].map(len) * 3
    more.loc[:30, "city"], more.loc[20:50, "job"], more.loc[40:60, "code"] = "?", "", 5
    tensors = columns_of(more, source)
    assert largest_gap(source, tensors) == 0.0


@pytest.mark.parametrize("unknown", ["ignore", "infrequent_if_exist"])
def test_missing_strings_are_a_category_of_their_own_where_training_had_them(unknown: str) -> None:
    frame = people(300, 0, gaps=True)[["city", "income"]]
    step = compose.ColumnTransformer([("c", pre.OneHotEncoder(handle_unknown=unknown), ["city"])])
    source = from_sklearn(step.fit(frame), frame)
    got = answers(source, source.example)["transformed"]
    missing = frame["city"].isna().to_numpy()
    assert missing.any()
    np.testing.assert_array_equal(got[:, -1], missing)
    assert largest_gap(source) == 0.0


def test_histogram_boosting_takes_a_frame_with_categories_of_strings() -> None:
    frame = people(500, 0, gaps=True).astype({"city": "category", "job": "category", "note": "category"})
    model = ensemble.HistGradientBoostingClassifier(max_iter=10, categorical_features="from_dtype")
    source = from_sklearn(model.fit(frame, spends(frame)), frame.head(200))
    tensors = {name: array.copy() for name, array in source.example.items()}
    tensors["city"][:20] = "nowhere"
    assert largest_gap(source, tensors) < 4e-15


def test_an_array_is_enough_for_a_model_that_was_trained_on_a_frame() -> None:
    frame = pd.DataFrame(X, columns=list("abcdef"))
    model = pipeline.make_pipeline(
        compose.ColumnTransformer([("s", pre.StandardScaler(), ["f", "a"])], remainder="passthrough"),
        ensemble.RandomForestRegressor(5),
    ).fit(frame, Y)
    source = from_sklearn(model, X[:50])
    assert source.inputs[0].columns == tuple("abcdef")
    assert largest_gap(source, {"x": MORE}) == 0.0


def test_columns_may_come_as_a_mapping_of_arrays() -> None:
    frame = people(200, 0)
    model = pipeline.make_pipeline(encoder(), ensemble.RandomForestClassifier(5)).fit(frame, spends(frame))
    source = from_sklearn(model, {name: frame[name].to_numpy() for name in frame.columns[::-1]})
    assert [(spec.name, spec.shape) for spec in source.inputs][:2] == [("age", ()), ("income", ())]
    assert largest_gap(source) == 0.0
