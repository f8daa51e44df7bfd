"""Fitted scikit-learn estimators and pipelines as one ONNX graph, or as a pickle where that was asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from parbake.contract.model import Step
from parbake.contract.sources import (
    lightgbm,
    sklearn_fallback,
    sklearn_linear,
    sklearn_svm,
    sklearn_trees,
    xgboost,
)
from parbake.contract.sources.answer import (
    Answer,
    OneThread,
    Outputs,
    assemble,
    decided,
    exponential,
    most,
    output_specs,
    plain,
    quietly,
)
from parbake.contract.sources.example import Example, Rows, read, rows_for
from parbake.contract.sources.graph import BOOL, DOUBLE, INT64, Graph, Value
from parbake.contract.sources.model import Source
from parbake.contract.sources.sklearn_preprocessing import TRANSFORMERS, transform
from parbake.contract.sources.table import Column, Table, Work, joined, matrix, of_example, select, uniform
from parbake.contract.tensors import Tensors
from parbake.errors import MissingExtra, NotConvertible, PackRefused

Estimator = Callable[[Work, Any, Table], Answer]

_PICKLE: Final = "model.pkl"


def from_sklearn(model: Any, example: object, *, allow_pickle: bool = False, convert: bool = True) -> Source:
    """Convert a fitted estimator or pipeline; LightGBM and XGBoost models may be its last step.

    Preprocessing becomes part of the graph, in scikit-learn's own order of operations and datatypes.
    Outputs: ``label`` with ``probability`` or ``score`` of classifiers and outlier detectors,
    ``prediction`` of regressors, ``label`` of clusterings, ``transformed`` of transformers.

    A category that training did not know cannot raise an error inside a graph: with
    ``handle_unknown="error"`` it is answered as "none of the known ones".

    Without ``convert`` the model is pickled as it is, which needs ``allow_pickle``.

    Raises `NotConvertible` where no conversion is known and ``allow_pickle`` is false, `PackRefused`
    where the example does not fit the model.
    """
    try:
        import sklearn
    except ImportError as error:
        raise MissingExtra("scikit-learn", "sklearn") from error
    version = str(sklearn.__version__)
    _check_fitted(model)
    rows = _rows(model, read(example))
    try:
        if convert or not allow_pickle:
            return _graph(model, rows, version)
    except NotConvertible:
        if not allow_pickle:
            raise
    return _pickled(model, rows, version)


def _check_fitted(model: Any) -> None:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    try:
        check_is_fitted(model)
    except NotFittedError:
        raise PackRefused(f"the {type(model).__name__} is not fitted", hint="fit it first") from None
    except TypeError:
        # Not an estimator by scikit-learn's own definition; its conversion will say so.
        return


def _rows(model: Any, example: Example) -> Rows:
    names = getattr(model, "feature_names_in_", None)
    if names is None:
        return rows_for(example, None)
    dropped = _dropped(model)
    # What a ColumnTransformer drops need not be in the example, nor then in the contract.
    needed = [str(name) for name in names if str(name) not in dropped]
    if example.kind in ("matrix", "columns") or (example.kind == "tensors" and len(example.specs) > 1):
        return rows_for(example, needed)
    return rows_for(example, [str(name) for name in names])


def _dropped(model: Any) -> set[str]:
    """Columns that the first step, a ColumnTransformer, drops."""
    first = model
    while hasattr(first, "steps") or hasattr(first, "best_estimator_"):
        first = first.best_estimator_ if hasattr(first, "best_estimator_") else first.steps[0][1]
    if type(first).__name__ != "ColumnTransformer" or not hasattr(first, "feature_names_in_"):
        return set()
    used: set[int] = set()
    for name, step, _ in first.transformers_:
        if not (isinstance(step, str) and step == "drop"):
            used.update(int(i) for i in np.ravel(first._transformer_to_input_indices[name]))
    return {str(name) for i, name in enumerate(first.feature_names_in_) if i not in used}


def _graph(model: Any, rows: Rows, version: str) -> Source:
    specs = rows.example.specs
    may_be_nan = any(spec.allow_nan for spec in specs)
    work = Work(Graph(specs), may_be_nan=may_be_nan)
    table = _in_order_of_training(work.graph, model, of_example(work.graph, rows.example, specs), rows)
    expected = getattr(model, "n_features_in_", table.width)
    if expected != table.width:
        raise PackRefused(
            f"the model was trained on {expected} columns, the example has {table.width}",
            hint="give the example the columns of the training data, in their order",
        )
    answer = _answer(work, model, table)
    return assemble(
        work,
        answer,
        rows.example,
        specs,
        _predictor(model, rows, tuple(answer.values)),
        framework="scikit-learn",
        version=version,
    )


def _in_order_of_training(graph: Graph, model: Any, table: Table, rows: Rows) -> Table:
    """The table with a place for each column of the training data, also for those that are dropped unseen."""
    names = getattr(model, "feature_names_in_", None)
    if names is None or rows.names is None or len(rows.names) == len(names):
        return table
    have = {name: i for i, name in enumerate(rows.names)}
    parts: list[Value] = []
    columns: list[Column] = []
    run: list[int] = []
    for name in [*map(str, names), None]:
        if name in have:
            run.append(have[name])
            continue
        if run:
            between = select(graph, table, run)
            parts.extend(between.parts)
            columns.extend(between.columns)
            run = []
        if name is not None:
            parts.append(Value("", DOUBLE, 1))
            columns.append(Column())
    return Table(tuple(parts), tuple(columns))


def _answer(work: Work, model: Any, table: Table) -> Answer:
    """What the estimator answers for the table, by whichever conversion knows it."""
    name = type(model).__name__
    module = type(model).__module__
    if module.startswith("lightgbm."):
        return lightgbm.add(work, model, table)
    if module.startswith("xgboost."):
        return xgboost.add(work, model, table)
    if not module.startswith("sklearn."):
        raise NotConvertible(
            f"no exact conversion of {name} is known", hint="pack a module:function, or --allow-pickle"
        )
    # Platt's probabilities of support vector machines are left to skl2onnx.
    if name in ESTIMATORS and getattr(model, "probability", False) is not True:
        return ESTIMATORS[name](work, model, table)
    if name in TRANSFORMERS or (
        module.startswith("sklearn.feature_selection") and not hasattr(model, "predict")
    ):
        return _transformed(work, model, table)
    return sklearn_fallback.add(work, model, table)[0]


def _transformed(work: Work, model: Any, table: Table) -> Answer:
    out = transform(work, model, table)
    return Answer({"transformed": matrix(work.graph, out)})


def _pipeline(work: Work, model: Any, table: Table) -> Answer:
    *before, (_, last) = model.steps
    for _, step in before:
        table = _step(work, step, table)
    if last is None or (isinstance(last, str) and last == "passthrough"):
        return Answer({"transformed": matrix(work.graph, table)})
    return _answer(work, last, table)


def _step(work: Work, step: Any, table: Table) -> Table:
    """One transformer, or what skl2onnx makes of it."""
    try:
        return transform(work, step, table)
    except NotConvertible:
        if isinstance(step, str) or type(step).__name__ in TRANSFORMERS or hasattr(step, "predict"):
            raise
    if not type(step).__module__.startswith("sklearn."):
        raise NotConvertible(
            f"no exact conversion of {type(step).__name__} is known",
            hint="pack a module:function, or --allow-pickle",
        )
    answer, fine = sklearn_fallback.add(work, step, table)
    if "transformed" not in answer.values:
        raise NotConvertible(f"no exact conversion of {type(step).__name__} is known", hint="--allow-pickle")
    value = answer.values["transformed"]
    return Table(
        (value,), (Column(),) * value.width, coarse=table.coarse or ("" if fine else type(step).__name__)
    )


def _eliminated(work: Work, model: Any, table: Table) -> Answer:
    return _answer(work, model.estimator_, transform(work, model, table))


def _each_target(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    parts = [graph.column(_answer(work, one, table).values["prediction"]) for one in model.estimators_]
    return Answer({"prediction": graph.concat([graph.cast(part, DOUBLE) for part in parts])})


def _search(work: Work, model: Any, table: Table) -> Answer:
    return _answer(work, model.best_estimator_, table)


def _transformed_target(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    inner = graph.column(_answer(work, model.regressor_, table).values["prediction"])
    back = model.transformer_
    name = type(back).__name__
    function = getattr(getattr(back, "inverse_func", None), "__name__", "")
    if name == "StandardScaler":
        out = inner
        if back.with_std:
            out = graph.op("Mul", out, graph.constant(np.asarray(back.scale_).reshape(1, -1), out.dtype))
        if back.with_mean:
            out = graph.op("Add", out, graph.constant(np.asarray(back.mean_).reshape(1, -1), out.dtype))
    elif name == "MinMaxScaler" and not back.clip:
        out = graph.op("Sub", inner, graph.constant(np.asarray(back.min_).reshape(1, -1), inner.dtype))
        out = graph.op("Div", out, graph.constant(np.asarray(back.scale_).reshape(1, -1), inner.dtype))
    elif name == "FunctionTransformer" and back.inverse_func is None:
        out = inner
    elif name == "FunctionTransformer" and function in ("exp", "expm1") and not back.inv_kw_args:
        out = exponential(graph, inner)
        if function == "expm1":
            out = graph.op("Sub", out, graph.constant(1.0, out.dtype))
    else:
        raise NotConvertible(
            f"TransformedTargetRegressor that goes back by {function or name}",
            hint="pack a module:function, or --allow-pickle",
        )
    work.loosen(*((1e-9, 1e-12) if out.dtype == DOUBLE else (1e-5, 1e-6)))
    return Answer({"prediction": graph.flat(out) if model._training_dim == 1 and out.width == 1 else out})


def _weighted_mean(graph: Graph, values: Sequence[Value], weights: Any) -> Value:
    total: Value | None = None
    factors = [1.0] * len(values) if weights is None else [float(w) for w in weights]
    for value, factor in zip(values, factors, strict=True):
        wide = graph.cast(value, DOUBLE)
        term = wide if weights is None else graph.op("Mul", wide, graph.constant(factor))
        total = term if total is None else graph.op("Add", total, term)
    if total is None:
        raise NotConvertible("a vote without voters")
    return graph.op("Div", total, graph.constant(float(np.sum(factors))))


def _voting_classifier(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    answers = [_answer(work, one, table) for one in model.estimators_]
    weights = model._weights_not_none
    if model.voting == "soft":
        share = _weighted_mean(graph, [answer.values["probability"] for answer in answers], weights)
        work.loosen(1e-12, 1e-12)
        return decided(graph, most(graph, share), model.classes_, probability=share)
    positions = graph.constant([list(range(len(model.classes_)))], INT64)
    votes: list[Value] = []
    for answer in answers:
        if answer.index is None:
            raise NotConvertible("a VotingClassifier of something that is no classifier")
        hot = graph.op("Equal", graph.column(answer.index), positions, dtype=BOOL, width=len(model.classes_))
        votes.append(graph.cast(hot, DOUBLE))
    total = _weighted_mean(graph, votes, weights)
    return Answer({"label": decided(graph, most(graph, total), model.classes_).values["label"]})


def _voting_regressor(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    values = [graph.column(_answer(work, one, table).values["prediction"]) for one in model.estimators_]
    work.loosen(1e-12, 1e-12)
    return Answer({"prediction": graph.flat(_weighted_mean(graph, values, model._weights_not_none))})


def _stacking(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    if any(isinstance(one, str) for one in model.estimators_):
        raise NotConvertible("a stack with dropped estimators", hint="leave them out of the stack")
    parts: list[Table] = []
    for one, method in zip(model.estimators_, model.stack_method_, strict=True):
        values = _answer(work, one, table).values
        key = {"predict_proba": "probability", "decision_function": "score", "predict": "prediction"}[method]
        if key not in values:
            raise NotConvertible(f"a stack on the {method} of {type(one).__name__}", hint="--allow-pickle")
        value = graph.column(values[key])
        if key == "probability" and value.width == 2:
            # The first column says nothing that the second does not.
            value = graph.take(value, [1])
        parts.append(Table((value,), (Column(),) * value.width))
    if model.passthrough:
        parts.append(uniform(graph, table))
    stacked = joined(graph, [replace(part, sparse=False) for part in parts], sparse=False)
    answer = _answer(work, model.final_estimator_, stacked)
    if answer.index is None:
        return answer
    values = {name: value for name, value in answer.values.items() if name != "label"}
    return decided(graph, answer.index, model.classes_, **values)


ESTIMATORS: Final[dict[str, Estimator]] = {
    **sklearn_trees.ESTIMATORS,
    **sklearn_linear.ESTIMATORS,
    **sklearn_svm.ESTIMATORS,
    "Pipeline": _pipeline,
    "RFE": _eliminated,
    "RFECV": _eliminated,
    "MultiOutputRegressor": _each_target,
    "GridSearchCV": _search,
    "RandomizedSearchCV": _search,
    "HalvingGridSearchCV": _search,
    "HalvingRandomSearchCV": _search,
    "TransformedTargetRegressor": _transformed_target,
    "VotingClassifier": _voting_classifier,
    "VotingRegressor": _voting_regressor,
    "StackingClassifier": _stacking,
    "StackingRegressor": _stacking,
}


# What the model itself answers

_METHODS: Final[Mapping[str, str]] = {
    "label": "predict",
    "prediction": "predict",
    "probability": "predict_proba",
    "score": "decision_function",
    "transformed": "transform",
}


def _predictor(model: Any, rows: Rows, names: Sequence[str]) -> Callable[[Tensors], Outputs]:
    """The model's own answers."""
    alone = OneThread()

    def predict(tensors: Tensors) -> Outputs:
        data = rows(tensors)
        answers = alone(lambda: [getattr(model, _METHODS[name])(data) for name in names])
        return {name: _plain(answer) for name, answer in zip(names, answers, strict=True)}

    return predict


def _plain(answer: Any) -> Any:
    dense = answer.toarray() if hasattr(answer, "toarray") else answer
    return plain(np.asarray(dense))


def _names_of_answers(model: Any, rows: Rows) -> tuple[str, ...]:
    """Which outputs a model that is not converted has."""
    if hasattr(model, "predict"):
        sample = np.asarray(quietly(lambda: model.predict(rows(rows.example.tensors))))
        if not hasattr(model, "classes_") and sample.dtype.kind == "f":
            return ("prediction",)
        if hasattr(model, "predict_proba"):
            return ("label", "probability")
        return ("label", "score") if hasattr(model, "decision_function") else ("label",)
    if hasattr(model, "transform"):
        return ("transformed",)
    raise NotConvertible(f"{type(model).__name__} has neither predict nor transform")


def _pickled(model: Any, rows: Rows, version: str) -> Source:
    """The estimator as it is, for a runner that is allowed to unpickle it."""
    import joblib

    if any(column.missing and column.marker is None for column in rows.example.columns):
        raise NotConvertible(
            "a pickle cannot be given None for missing strings",
            hint="train with NaN (or a word) instead of None",
        )
    if rows.names is not None and rows.example.kind in ("matrix", "columns"):
        # The step takes a frame only from one input per column.
        rows = replace(rows, example=rows.example.by_column())
    names = _names_of_answers(model, rows)
    predict = _predictor(model, rows, names)
    outputs = predict(rows.example.tensors)
    labels = [str(c) for c in np.ravel(getattr(model, "classes_", ())).tolist()]
    buffer = io.BytesIO()
    joblib.dump(model, buffer)
    entry = ",".join(f"{name}={_METHODS[name]}" for name in names)
    modules = {type(part).__module__.partition(".")[0] for part in _parts(model)}
    distributions = {"sklearn": "scikit-learn", "lightgbm": "lightgbm", "xgboost": "xgboost"}
    required = ["scikit-learn", *(d for m, d in distributions.items() if m in modules and m != "sklearn")]
    if rows.names is not None:
        required.append("pandas")
    return Source(
        framework="scikit-learn",
        framework_version=version,
        inputs=rows.example.specs,
        outputs=output_specs(outputs, labels),
        steps=(Step("pickle", _PICKLE, entry),),
        files={_PICKLE: buffer.getvalue()},
        predict=predict,
        example=dict(rows.example.tensors),
        required=tuple(required),
        rtol=0.0,
        atol=0.0,
    )


def _parts(model: Any) -> list[Any]:
    """The model and the steps of its pipelines."""
    found = [model]
    for _, step in getattr(model, "steps", ()):
        found.extend(_parts(step))
    return found
