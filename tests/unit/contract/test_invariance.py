"""Batch invariance: what really happens in onnxruntime is measured, and the policy restores equal bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, helper

from parbake.contract import invariance
from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.invariance import Findings, company, holds, measure, policy, threads_matter
from parbake.contract.model import Batch, Contract, Step, TensorSpec
from parbake.contract.tensors import Tensor, Tensors
from parbake.runtime.session import Session
from tests import models

X = {"x": np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)}
Y = (TensorSpec("y", "FP32"),)


def runner(model: ModelProto, threads: int = 1) -> Any:
    """onnxruntime itself: no padding."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda tensors: dict(zip(names, session.run(names, dict(tensors)), strict=True))


def stored(tmp_path: Path, model: ModelProto, outputs: tuple[TensorSpec, ...], width: int) -> StoredBundle:
    """A bundle of a model with input x."""
    contract = Contract(
        "m", (TensorSpec("x", "FP32", (width,)),), outputs, (Step("onnx", "model.onnx"),), "p", "o"
    )
    empty = Goldens({"x": np.zeros((0, width), np.float32)}, {o.name: np.zeros((0,)) for o in outputs})
    return write_bundle(
        tmp_path / "m.bundle", contract, {"model.onnx": model.SerializeToString()}, empty, capture()
    )


def test_a_function_of_the_row_alone_is_invariant() -> None:
    assert measure(lambda t: {"y": t["x"].sum(axis=1)}, X, Y) == Findings(1)


def test_a_lone_row_that_differs_is_padded_to_two() -> None:
    def gemv(tensors: Tensors) -> dict[str, Tensor]:
        alone = np.float32(1e-6 if len(tensors["x"]) == 1 else 0.0)
        return {"y": tensors["x"][:, 0] + alone}

    assert measure(gemv, X, Y) == Findings(2)


def test_what_is_left_over_from_packets_of_four_is_padded_away() -> None:
    def packets(tensors: Tensors) -> dict[str, Tensor]:
        y = tensors["x"][:, 0].copy()
        rest = len(y) % 4
        if rest:
            y[-rest:] = np.nextafter(y[-rest:], np.float32(9))
        return {"y": y}

    assert measure(packets, X, Y) == Findings(4, 4)


def test_a_model_that_looks_at_its_neighbours_has_a_spread() -> None:
    def normalised(tensors: Tensors) -> dict[str, Tensor]:
        x = tensors["x"][:, 0]
        return {"y": x - x.mean(), "rank": np.argsort(np.argsort(x))}

    found = measure(normalised, X, Y)
    assert found.invariant_from is None
    assert 1.0 < found.spread < 10.0
    assert not found.labels_differ
    assert measure(normalised, X, (*Y, TensorSpec("rank", "INT64"))).labels_differ


def test_strings_and_rows_of_any_size_are_compared_too() -> None:
    def first(tensors: Tensors) -> dict[str, Any]:
        alone = len(tensors["x"]) == 1
        return {"word": np.array(["alone" if alone else "together"] * len(tensors["x"]), dtype=object)}

    assert measure(first, X, (TensorSpec("word", "BYTES"),)) == Findings(2)
    assert measure(lambda t: {"y": t["x"]}, X, (TensorSpec("y", "FP32", (-1,)),)) == Findings(1)


@pytest.mark.parametrize("operator", ["Exp", "Softmax", "Tanh"])
def test_doubles_in_packets_differ_in_onnxruntime_and_the_policy_restores_them(operator: str) -> None:
    # Eigen takes two doubles at a time, and the odd one with another exponential.
    node = helper.make_node(operator, ["x"], ["y"])
    shape = ("N", 3)
    model = models.model(
        [node], [models.tensor("x", models.DOUBLE, shape)], [models.tensor("y", models.DOUBLE, shape)]
    )
    pool = {"x": np.random.default_rng(0).normal(size=(512, 3)) * 3}
    run = runner(model)
    found = measure(run, pool, (TensorSpec("y", "FP64", (3,)),))
    assert found.invariant_from is not None
    padded = invariance._padding(run, found.multiple_of)
    assert holds(padded, pool, (TensorSpec("y", "FP64", (3,)),))


def test_a_linear_classifier_in_onnxruntime_keeps_its_bits_through_the_session(tmp_path: Path) -> None:
    model = models.linear_classifier(30)
    outputs = (TensorSpec("label", "INT64"), TensorSpec("p", "FP32", (3,)))
    pool = {"x": np.random.default_rng(0).normal(size=(512, 30)).astype(np.float32)}
    found = measure(runner(model), pool, outputs)
    assert found.invariant_from is not None
    bundle = stored(tmp_path, model, outputs, 30)
    session = Session(bundle, batch=policy(found, "any", False, 4096))
    assert holds(session.run, pool, outputs)
    if found.invariant_from > 1:
        # The policy is what does it: without it the bits do differ.
        assert not holds(Session(bundle, batch=Batch()).run, pool, outputs)


def test_trees_summed_by_several_threads_get_one(tmp_path: Path) -> None:
    model = models.forest(120)
    outputs = (TensorSpec("y", "FP32", (1,)),)
    one, several = runner(model), [runner(model, threads) for threads in (2, 4)]
    assert measure(one, X, outputs) == Findings(1)
    assert threads_matter(one, several, X, outputs)
    bundle = stored(tmp_path, model, outputs, 6)
    pinned = Session(bundle, threads=4, batch=Batch(one_thread=True))
    assert not threads_matter(one, [pinned.run], X, outputs)


def test_a_model_whose_bits_are_the_same_on_any_threads_keeps_them() -> None:
    model = models.linear(6)
    pool, outputs = X, (TensorSpec("y", "FP32", (2,)),)
    assert not threads_matter(runner(model), [runner(model, 2)], pool, outputs)


def test_company_is_the_example_and_then_variations_of_it() -> None:
    example = {
        "x": np.array([[1.0, 0.0], [2.0, 4.0]]),
        "n": np.array([1, 2]),
        "s": np.array(["a", "b"], dtype=object),
    }
    inputs = (TensorSpec("x", "FP64", (2,)), TensorSpec("n", "INT64"), TensorSpec("s", "BYTES"))
    pool = company(example, inputs, 40)
    assert {len(array) for array in pool.values()} == {40}
    assert pool["x"][:2].tolist() == example["x"].tolist()
    assert len(np.unique(pool["x"], axis=0)) == 40
    assert set(pool["s"]) == {"a", "b"}
    again: Mapping[str, Tensor] = company(example, inputs, 40)
    assert all((pool[name] == again[name]).all() for name in pool)
    assert len(company(example, inputs, 1)["x"]) == 1


def test_the_policy_records_the_spread_only_where_it_remains() -> None:
    assert policy(Findings(4, 4), "any", True, 64) == Batch("any", 4, 4, 0.0, True, 64)
    assert policy(Findings(None, spread=0.5), "any", False, 64) == Batch("any", None, 1, 0.5, False, 64)
