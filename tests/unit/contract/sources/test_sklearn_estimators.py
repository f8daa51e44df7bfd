"""scikit-learn's other estimators, estimators of estimators, and what cannot be converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parbake.contract.bundle import Goldens, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract
from parbake.contract.sources.sklearn import from_sklearn
from parbake.contract.tensors import Tensor
from parbake.errors import NotConvertible, PackRefused
from parbake.runtime.session import Session
from tests.unit.contract.sources.agreement import answers, largest_gap, numbers, target

pytestmark = pytest.mark.needs("sklearn", "pandas")

cluster: Any = pytest.importorskip("sklearn.cluster")
compose: Any = pytest.importorskip("sklearn.compose")
discriminant: Any = pytest.importorskip("sklearn.discriminant_analysis")
ensemble: Any = pytest.importorskip("sklearn.ensemble")
linear: Any = pytest.importorskip("sklearn.linear_model")
model_selection: Any = pytest.importorskip("sklearn.model_selection")
multioutput: Any = pytest.importorskip("sklearn.multioutput")
naive_bayes: Any = pytest.importorskip("sklearn.naive_bayes")
neighbors: Any = pytest.importorskip("sklearn.neighbors")
network: Any = pytest.importorskip("sklearn.neural_network")
pd: Any = pytest.importorskip("pandas")
pipeline: Any = pytest.importorskip("sklearn.pipeline")
pre: Any = pytest.importorskip("sklearn.preprocessing")
selection: Any = pytest.importorskip("sklearn.feature_selection")
svm: Any = pytest.importorskip("sklearn.svm")
tree: Any = pytest.importorskip("sklearn.tree")


def standard(x: Tensor) -> Tensor:
    return np.asarray(np.delete((x - numbers(400).mean(axis=0)) / numbers(400).std(axis=0), 2, axis=1))


X = standard(numbers(400))
Y = target(numbers(400))
MORE = standard(numbers(800, seed=1))
THREE = np.array(["low", "middle", "high"])[np.digitize(Y, np.quantile(Y, [0.3, 0.7]))]
TWO = np.greater(Y, np.median(Y))
BOTH = np.stack([Y, -Y], axis=1)

MODELS: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
    "logistic": (lambda: linear.LogisticRegression(max_iter=300), THREE),
    "logistic of two": (linear.LogisticRegression, TWO),
    "liblinear": (lambda: linear.LogisticRegression(solver="liblinear"), TWO),
    "linear": (linear.LinearRegression, Y),
    "linear of two targets": (linear.LinearRegression, BOTH),
    "linear of a column": (linear.LinearRegression, Y[:, np.newaxis]),
    "ridge": (linear.Ridge, Y),
    "through the origin": (lambda: linear.Ridge(fit_intercept=False), Y),
    "poisson": (linear.PoissonRegressor, np.abs(Y)),
    "hinge": (lambda: linear.SGDClassifier(random_state=0), THREE),
    "huber": (lambda: linear.SGDClassifier(loss="modified_huber", random_state=0), THREE),
    "huber of two": (lambda: linear.SGDClassifier(loss="modified_huber", random_state=0), TWO),
    "one against the rest": (lambda: linear.SGDClassifier(loss="log_loss", random_state=0), THREE),
    "perceptron": (linear.Perceptron, TWO),
    "ridge classifier": (linear.RidgeClassifier, THREE),
    "linear support vectors": (svm.LinearSVC, THREE),
    "network": (lambda: network.MLPClassifier((8,), tol=9.0, n_iter_no_change=2, random_state=0), THREE),
    "network of two": (
        lambda: network.MLPClassifier((8, 4), activation="tanh", tol=9.0, n_iter_no_change=2, random_state=0),
        TWO,
    ),
    "network regressor": (
        lambda: network.MLPRegressor(
            hidden_layer_sizes=(8,), activation="logistic", tol=9.0, n_iter_no_change=2, random_state=0
        ),
        Y,
    ),
    "naive bayes": (naive_bayes.GaussianNB, THREE),
    "means": (lambda: cluster.KMeans(3, n_init=1, random_state=0), None),
    "support vectors": (svm.SVC, TWO),
    "support vectors of three": (lambda: svm.SVC(kernel="poly"), THREE),
    "support vectors, ties broken": (lambda: svm.SVC(break_ties=True), THREE),
    "support vectors in pairs": (lambda: svm.SVC(decision_function_shape="ovo", kernel="sigmoid"), THREE),
    "support vector regressor": (svm.SVR, Y),
    "one class": (svm.OneClassSVM, None),
    "soft vote": (
        lambda: ensemble.VotingClassifier(
            [("a", tree.DecisionTreeClassifier(max_depth=4)), ("b", linear.LogisticRegression())],
            voting="soft",
            weights=[1, 2],
        ),
        THREE,
    ),
    "hard vote": (
        lambda: ensemble.VotingClassifier(
            [
                (name, tree.DecisionTreeClassifier(max_depth=depth))
                for name, depth in zip("abc", (2, 4, 6), strict=True)
            ]
        ),
        THREE,
    ),
    "mean vote": (
        lambda: ensemble.VotingRegressor(
            [("a", tree.DecisionTreeRegressor(max_depth=4)), ("b", linear.Ridge())]
        ),
        Y,
    ),
    "stack": (
        lambda: ensemble.StackingClassifier(
            [("a", tree.DecisionTreeClassifier(max_depth=3)), ("b", linear.RidgeClassifier())], cv=2
        ),
        TWO,
    ),
    "stack regressor": (
        lambda: ensemble.StackingRegressor(
            [("a", tree.DecisionTreeRegressor(max_depth=3)), ("b", linear.Ridge())], passthrough=True, cv=2
        ),
        Y,
    ),
    "logarithm of the target": (
        lambda: compose.TransformedTargetRegressor(linear.Ridge(), func=np.log1p, inverse_func=np.expm1),
        np.abs(Y),
    ),
    "scaled target": (
        lambda: compose.TransformedTargetRegressor(linear.Ridge(), transformer=pre.StandardScaler()),
        Y,
    ),
    "features eliminated": (lambda: selection.RFE(linear.Ridge(), n_features_to_select=2), Y),
    "one model per target": (
        lambda: multioutput.MultiOutputRegressor(tree.DecisionTreeRegressor(max_depth=4)),
        BOTH,
    ),
    "quadratic (skl2onnx)": (discriminant.QuadraticDiscriminantAnalysis, THREE),
    "search": (
        lambda: model_selection.GridSearchCV(tree.DecisionTreeClassifier(), {"max_depth": [2, 5]}, cv=2),
        THREE,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_estimators_answer_as_scikit_learn_within_what_they_promise(name: str) -> None:
    make, labels = MODELS[name]
    model = make().fit(X, labels) if labels is not None else make().fit(X)
    source = from_sklearn(model, X[:50])
    assert source.atol is not None
    assert source.atol <= 1e-6
    assert largest_gap(source, {"x": MORE}) <= source.atol


@pytest.mark.parametrize("name", ["logistic", "logistic of two", "linear", "network", "ridge"])
def test_float32_models_answer_in_float32(name: str) -> None:
    make, labels = MODELS[name]
    x = X.astype(np.float32)
    source = from_sklearn(make().fit(x, labels), x[:50])
    assert largest_gap(source, {"x": MORE.astype(np.float32)}) < 1e-5


def test_the_last_row_of_a_batch_has_the_bits_it_has_alone() -> None:
    for make in (ensemble.HistGradientBoostingClassifier, ensemble.GradientBoostingClassifier):
        for labels in (TWO, THREE):
            source = from_sklearn(make(random_state=0).fit(X, labels), X[:10])
            together = answers(source, {"x": MORE[:31]})["probability"]
            for size in (1, 2, 3, 7):
                alone = answers(source, {"x": MORE[31 - size : 31]})["probability"]
                np.testing.assert_array_equal(alone, together[-size:])


def test_what_cannot_be_converted_is_named_with_two_ways_out() -> None:
    model = ensemble.BaggingClassifier(n_estimators=2).fit(X, THREE)
    with pytest.raises(NotConvertible, match="no exact conversion of BaggingClassifier is known") as caught:
        from_sklearn(model, X[:10])
    assert "module:function" in caught.value.hint
    assert "--allow-pickle" in caught.value.hint


def test_a_model_that_is_not_fitted_is_refused() -> None:
    with pytest.raises(PackRefused, match="the RandomForestClassifier is not fitted"):
        from_sklearn(ensemble.RandomForestClassifier(), X[:10])


def test_an_example_of_another_width_or_kind_is_refused() -> None:
    model = linear.Ridge().fit(X, Y)
    with pytest.raises(PackRefused, match="trained on 5 columns, the example has 3"):
        from_sklearn(model, X[:10, :3])
    with pytest.raises(PackRefused, match="the model does not take the example: could not convert string"):
        from_sklearn(tree.DecisionTreeRegressor().fit(X, Y), np.full((3, 5), "word"))


def test_neighbours_are_refused_because_a_last_digit_decides_who_is_one() -> None:
    model = neighbors.KNeighborsRegressor().fit(X, Y)
    with pytest.raises(NotConvertible, match="turns on the last digit of distances"):
        from_sklearn(model, X[:10])
    assert from_sklearn(model, X[:10], allow_pickle=True).steps[0].kind == "pickle"


def test_a_function_inside_a_pipeline_is_named() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    model = pipeline.make_pipeline(pre.FunctionTransformer(double), linear.Ridge()).fit(X, Y)
    with pytest.raises(NotConvertible, match="runs the Python function double"):
        from_sklearn(model, X[:10])


def run_bundle(source: Any, folder: Path) -> dict[str, Tensor]:
    contract = Contract("m", source.inputs, source.outputs, source.steps, "test", "tests@parbake.example")
    expected = source.predict(source.example)
    bundle = write_bundle(folder / "m", contract, source.files, Goldens(source.example, expected), capture())
    return Session(bundle, allow_pickle=True).run(source.example)


def test_a_pickle_that_was_asked_for_answers_as_the_model_does(tmp_path: Path) -> None:
    model = ensemble.BaggingClassifier(n_estimators=3).fit(X, THREE)
    source = from_sklearn(model, X[:20], allow_pickle=True)
    assert [step.kind for step in source.steps] == ["pickle"]
    assert source.required == ("scikit-learn",)
    got = run_bundle(source, tmp_path)
    assert got["label"].tolist() == model.predict(X[:20]).tolist()
    np.testing.assert_array_equal(got["probability"], model.predict_proba(X[:20]))


def test_a_pickle_takes_the_frame_that_it_was_trained_on(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1]})
    scaler = compose.ColumnTransformer([("s", pre.StandardScaler(), ["b"])], remainder="passthrough")
    model = pipeline.make_pipeline(scaler, ensemble.BaggingRegressor(n_estimators=3)).fit(frame, Y)
    source = from_sklearn(model, frame.head(20), allow_pickle=True)
    assert [spec.name for spec in source.inputs] == ["a", "b"]
    assert "pandas" in source.required
    np.testing.assert_array_equal(run_bundle(source, tmp_path)["prediction"], model.predict(frame.head(20)))


def test_the_same_model_gives_the_same_bytes() -> None:
    model = pipeline.make_pipeline(pre.StandardScaler(), tree.DecisionTreeClassifier()).fit(X, THREE)
    assert from_sklearn(model, X[:20]).files == from_sklearn(model, X[:20]).files
