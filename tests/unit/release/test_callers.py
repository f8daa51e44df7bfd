"""What breaks the callers of the version that is replaced, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from parbake.contract.model import Batch, Contract, Key, Step, TensorSpec
from parbake.release.callers import breaking, changes

SPECS = st.builds(
    TensorSpec,
    name=st.sampled_from(["a", "b", "c", "d"]),
    datatype=st.sampled_from(["FP32", "FP64", "INT64", "BYTES"]),
    shape=st.lists(st.sampled_from([-1, 1, 2, 3]), max_size=2).map(tuple),
    unit=st.sampled_from(["", "m", "s"]),
    allow_nan=st.booleans(),
    columns=st.sampled_from([(), ("u", "v")]),
    labels=st.sampled_from([(), ("no", "yes")]),
)
SETS = st.lists(SPECS, min_size=1, max_size=3, unique_by=lambda spec: spec.name).map(tuple)
CONTRACTS = st.builds(
    lambda inputs, outputs, key, rows, default: contract(
        inputs=inputs, outputs=outputs, key=Key(key), batch=Batch(max_rows=rows), default=default
    ),
    SETS,
    SETS,
    st.sampled_from([(), ("a",)]),
    st.sampled_from([16, 4096]),
    st.sampled_from([None, {"y": 1}]),
)


def contract(**parts: Any) -> Contract:
    base = Contract(
        "eta",
        (TensorSpec("x", "FP32", (2,), unit="m"), TensorSpec("store", "INT64")),
        (TensorSpec("y", "FP32", (2,), unit="min", labels=("no", "yes")),),
        (Step("onnx", "m.onnx"),),
        "p",
        "o",
    )
    return replace(base, **parts)


def with_input(**parts: Any) -> Contract:
    base = contract()
    return replace(base, inputs=(replace(base.inputs[0], **parts), base.inputs[1]))


def with_output(**parts: Any) -> Contract:
    base = contract()
    return replace(base, outputs=(replace(base.outputs[0], **parts),))


@given(CONTRACTS)
def test_a_contract_changes_nothing_for_its_own_callers(one: Contract) -> None:
    assert changes(one, one) == ()


@given(CONTRACTS, CONTRACTS)
def test_what_differs_is_told_both_ways(one: Contract, other: Contract) -> None:
    assert bool(changes(one, other)) == bool(changes(other, one))


@given(CONTRACTS, CONTRACTS, CONTRACTS)
def test_two_steps_that_break_nobody_break_nobody_together(a: Contract, b: Contract, c: Contract) -> None:
    if not breaking(changes(a, b)) and not breaking(changes(b, c)):
        # But for what was left unsaid in between: a unit may have gone and come back as another.
        assert not [change for change in breaking(changes(a, c)) if not change.where.endswith("unit")]


@given(CONTRACTS, SPECS)
def test_one_more_output_breaks_nobody(one: Contract, spec: TensorSpec) -> None:
    wider = replace(one, outputs=(*one.outputs, replace(spec, name="new")))
    assert not breaking(changes(one, wider))
    assert breaking(changes(wider, one))


@given(CONTRACTS, SPECS)
def test_one_more_input_breaks_everybody(one: Contract, spec: TensorSpec) -> None:
    wider = replace(one, inputs=(*one.inputs, replace(spec, name="new")))
    assert [change.where for change in breaking(changes(one, wider))] == ["input new"]


@given(CONTRACTS, st.randoms(use_true_random=False))
def test_the_order_of_tensors_is_nobodys_business(one: Contract, random: Any) -> None:
    inputs, outputs = list(one.inputs), list(one.outputs)
    random.shuffle(inputs)
    random.shuffle(outputs)
    assert changes(one, replace(one, inputs=tuple(inputs), outputs=tuple(outputs))) == ()


@pytest.mark.parametrize(
    ("after", "where"),
    [
        (contract(inputs=contract().inputs[:1]), "input store"),
        (with_input(name="X"), "input x"),
        (with_input(datatype="FP64"), "input x, datatype"),
        (with_input(shape=(3,)), "input x, shape"),
        (with_input(unit="km"), "input x, unit"),
        (with_input(shape=(2, 1)), "input x, shape"),
        (contract(outputs=(TensorSpec("z", "FP32"),)), "output y"),
        (with_output(datatype="INT64"), "output y, datatype"),
        (with_output(shape=(-1,)), "output y, shape"),
        (with_output(unit="s"), "output y, unit"),
        (with_output(labels=("yes", "no")), "output y, labels"),
        (contract(key=Key(("store",))), "key"),
        (contract(batch=Batch(max_rows=8)), "rows a request"),
    ],
)
def test_what_breaks_callers(after: Contract, where: str) -> None:
    assert where in [change.where for change in breaking(changes(contract(), after))]


@pytest.mark.parametrize(
    "after",
    [
        with_input(shape=(-1,)),
        with_input(allow_nan=True),
        with_input(unit=""),
        contract(batch=Batch(max_rows=10_000)),
        contract(key=Key(rounding={"x": 2})),
        contract(default={"y": [0, 0]}),
        contract(purpose="another", owner="somebody else"),
    ],
)
def test_what_does_not(after: Contract) -> None:
    assert not breaking(changes(contract(), after))


def test_a_wider_input_cannot_be_taken_back() -> None:
    for wide in (with_input(shape=(-1,)), with_input(allow_nan=True)):
        assert breaking(changes(wide, contract()))
