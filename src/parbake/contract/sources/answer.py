"""What an estimator answers, in the graph, and how that and its own words become a Source."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from parbake.contract.datatypes import FLOATS, datatype_of
from parbake.contract.model import Step, TensorSpec
from parbake.contract.sources.example import Example
from parbake.contract.sources.graph import BOOL, DOUBLE, FLOAT, INT64, TEXT, Array, Graph, Value
from parbake.contract.sources.model import Source
from parbake.contract.sources.table import Work
from parbake.contract.tensors import Tensors
from parbake.errors import NotConvertible, PackRefused

FILE: Final = "model.onnx"
_SHAPE_ROWS: Final = 8

Outputs = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Answer:
    """The outputs of an estimator by name, and what it decided before it had names for it.

    ``index`` is the position in ``classes``, shape (rows,); it is there for classifiers alone.
    """

    values: Mapping[str, Value]
    index: Value | None = None
    classes: Array | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes as words."""
        return tuple(str(c) for c in self.classes.tolist()) if self.classes is not None else ()


def decided(graph: Graph, index: Value, classes: Any, **values: Value) -> Answer:
    """A classifier's answer: ``label`` by index, with what else it gives (probability, score)."""
    names = plain(np.asarray(classes))
    label = graph.op("Gather", graph.constant(names), index, dtype=names.dtype, width=0)
    return Answer({"label": label, **values}, index, np.asarray(classes))


def most(graph: Graph, scores: Value) -> Value:
    """The position of the largest score of each row, the first of equals, as numpy.argmax has it."""
    return graph.op("ArgMax", scores, dtype=INT64, width=0, axis=1, keepdims=0)


def above(graph: Graph, score: Value, limit: float, *, inclusive: bool = False) -> Value:
    """1 where a vector is over the limit (or at it, if inclusive), else 0."""
    kind = "GreaterOrEqual" if inclusive else "Greater"
    return graph.cast(graph.op(kind, score, graph.constant(limit, score.dtype), dtype=BOOL), INT64)


def exponential(graph: Graph, value: Value) -> Value:
    """exp(x), with bits that do not depend on the row's place in the batch."""
    paired = _paired(graph, graph.column(value), 0.0)
    power = graph.op("Exp", paired)
    if power.width != max(value.width, 1):
        power = graph.take(power, range(max(value.width, 1)))
    return power if value.width else graph.flat(power)


def _paired(graph: Graph, value: Value, filler: float) -> Value:
    """An even number of doubles per row.

    onnxruntime takes exponentials of doubles two at a time, and one that is left over at the end by another
    formula: the last row would end in other bits than it does in company.
    """
    if value.dtype != DOUBLE or value.width % 2 == 0:
        return value
    amounts = graph.constant([0, 0, 0, 1], INT64)
    return graph.op("Pad", value, amounts, graph.constant(filler), width=value.width + 1)


def logistic(graph: Graph, value: Value, slope: float = 1.0) -> Value:
    """1 / (1 + exp(-slope * x)), with small results as exact as large ones."""
    one = graph.constant(1.0, value.dtype)
    power = exponential(graph, graph.op("Mul", value, graph.constant(-slope, value.dtype)))
    return graph.op("Div", one, graph.op("Add", power, one), dtype=value.dtype, width=value.width)


def two_sided(graph: Graph, positive: Value) -> Value:
    """Probabilities of both classes from that of the second, shape (rows, 2)."""
    second = graph.column(positive)
    one = graph.constant(1.0, second.dtype)
    first = graph.op("Sub", one, second, dtype=second.dtype, width=1)
    return graph.concat([first, second])


def softmax(graph: Graph, scores: Value) -> Value:
    """exp(x - max) over its sum."""
    shares = graph.op("Softmax", _paired(graph, scores, float("-inf")), axis=1)
    return shares if shares.width == scores.width else graph.take(shares, range(scores.width))


def plain(array: Array) -> Array:
    """Answers in the datatypes that a contract uses: int64, float64, float32, bool, or strings as objects."""
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind == "b" or array.dtype in (FLOAT, DOUBLE):
        return array
    if array.dtype.kind == "f":
        return array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    items = array.reshape(-1).tolist()
    if all(isinstance(item, bool) for item in items):
        return array.astype(bool)
    if all(isinstance(item, int) for item in items):
        return array.astype(np.int64)
    odd = next((item for item in items if not isinstance(item, str)), None)
    if odd is not None:
        raise NotConvertible(
            f"the model answers with {odd!r}, a {type(odd).__name__}",
            hint="labels are numbers, booleans or strings",
        )
    return array.astype(TEXT)


def quietly(call: Callable[[], Any]) -> Any:
    """Run the source framework without its warnings for the person who trained the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


class OneThread:
    """Runs the source framework quietly and in one thread.

    With several workers a forest adds up in the order they finish; and threads that wait for each other on a
    busy machine make a prediction of a few rows a hundred times slower.
    """

    def __init__(self) -> None:
        self._pools: Any = None

    def __call__(self, call: Callable[[], Any]) -> Any:
        """What ``call`` gives."""
        try:
            joblib = importlib.import_module("joblib")
            threadpoolctl = importlib.import_module("threadpoolctl")
        except ImportError:
            return quietly(call)
        if self._pools is None:
            # Finding the loaded libraries takes far longer than a prediction.
            self._pools = threadpoolctl.ThreadpoolController()
        with joblib.parallel_config(backend="sequential"), self._pools.limit(limits=1):
            return quietly(call)


def output_specs(outputs: Outputs, labels: Sequence[str]) -> tuple[TensorSpec, ...]:
    """Specs of what the source framework itself answered."""
    return tuple(
        TensorSpec(
            name,
            datatype_of(array),
            tuple(array.shape[1:]),
            labels=tuple(labels) if name != "label" and array.shape[1:] == (len(labels),) else (),
        )
        for name, array in outputs.items()
    )


def assemble(
    work: Work,
    answer: Answer,
    example: Example,
    specs: Sequence[TensorSpec],
    predict: Callable[[Tensors], Outputs],
    *,
    framework: str,
    version: str,
) -> Source:
    """The Source of a converted graph, its output specs taken from what the source framework answers.

    Raises `NotConvertible` where the two do not even have the same outputs, `PackRefused` where the model
    refuses the example.
    """
    few = {name: array[:_SHAPE_ROWS] for name, array in example.tensors.items()}
    try:
        outputs = predict(few)
    except (ValueError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PackRefused(
            f"the model does not take the example: {first}", hint="rows as the model was trained on"
        ) from error
    if set(outputs) != set(answer.values):
        raise NotConvertible(
            f"the model answers with {', '.join(outputs)}, its conversion with {', '.join(answer.values)}",
            hint="pack a module:function, or --allow-pickle",
        )
    out_specs = output_specs(outputs, answer.labels)
    for spec in out_specs:
        value = answer.values[spec.name]
        if spec.shape == () and value.width == 1:
            value = work.graph.flat(value)
        work.graph.output(value, spec)
    in_specs = tuple(
        msgspec.structs.replace(spec, allow_nan=True)
        if spec.name in work.accepts_nan and spec.datatype in FLOATS
        else spec
        for spec in specs
    )
    return Source(
        framework=framework,
        framework_version=version,
        inputs=in_specs,
        outputs=out_specs,
        steps=(Step("onnx", FILE),),
        files={FILE: work.graph.to_bytes()},
        predict=predict,
        example={spec.name: example.tensors[spec.name] for spec in specs},
        thresholds=dict(work.thresholds),
        rtol=work.rtol,
        atol=work.atol,
        smooth=work.smooth,
    )
