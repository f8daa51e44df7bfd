"""One answer: a row gives the same bits from the table, by the model, and by both."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.bundle import StoredBundle
from parbake.contract.key import Keys
from parbake.contract.model import Batch, Contract, Key, TensorSpec
from parbake.contract.record import Records
from parbake.contract.rounding import round_inputs
from parbake.contract.tensors import Tensor, row_slices, to_raw
from parbake.errors import KeyNotBaked, NotReady, ParbakeError, RunnerDown
from parbake.monitoring.recorder import Recorder
from parbake.runtime.backends import InlineBackend
from parbake.runtime.batcher import Batcher
from parbake.runtime.session import Session
from parbake.serving.defaults import default_record
from parbake.serving.head import Head
from parbake.serving.model import Answer
from parbake.serving.service import Mode, ServedVersion
from parbake.serving.stats import Stats
from parbake.tables.memory import MemoryTable
from tests.functions import write_function
from tests.turns import Turns

FAR = 1e9

MODEL = """
import numpy as np

def predict(x, word):
    total = (x * np.float32(1.1)).sum(axis=1, dtype=np.float32)
    return {
        "score": np.stack([total, -total], axis=1),
        "shout": np.array([w.upper() + "!" for w in word], dtype=object),
        "size": np.array([len(w) for w in word]),
    }
"""
INPUTS = (TensorSpec("x", "FP32", (2,), columns=("left", "right")), TensorSpec("word", "BYTES"))
OUTPUTS = (TensorSpec("score", "FP32", (2,)), TensorSpec("shout", "BYTES"), TensorSpec("size", "INT64"))


class Service:
    """One version, served in this process on a loop that turns by hand."""

    def __init__(
        self, bundle: StoredBundle, mode: Mode, entries: dict[bytes, bytes] | None = None, **changed: Any
    ) -> None:
        self.loop = Turns()
        contract = changed.get("contract", bundle.contract)
        self.session = Session(bundle)
        batcher = None
        if mode != "static":
            batcher = Batcher(contract, [InlineBackend(self.session)], self.loop, longest_s=0.25)
        self.served = ServedVersion(
            contract.name, "1", contract, bundle.digest, mode=mode,
            table=MemoryTable(bundle.digest, entries) if entries is not None else None,
            batcher=batcher, deadline_s=10.0, stats=Stats(),
            default=default_record(contract, Records(contract)),
            head=changed.get("head"), recorder=changed.get("recorder"),
        )  # fmt: skip

    def ask(self, raws: Sequence[bytes], rows: int, shapes: Any = None) -> Answer:
        """The answer, whenever it comes. Raises what came instead."""
        results: list[Answer | ParbakeError] = []
        answer = self.served.predict(raws, rows, shapes, perf_counter() + 60, results.append)
        if answer is not None:
            assert not results
            return answer
        self.loop.settle()
        (result,) = results
        if isinstance(result, ParbakeError):
            raise result
        return result


def raws_of(contract: Contract, inputs: dict[str, Tensor]) -> list[bytes]:
    return [to_raw(inputs[spec.name], spec.datatype) for spec in contract.inputs]


def baked(bundle: StoredBundle, inputs: dict[str, Tensor], rows: Sequence[int]) -> dict[bytes, bytes]:
    """Entries of a table for some of the rows, computed together, as a batch job does."""
    if not rows:
        return {}
    contract = bundle.contract
    chosen = round_inputs(contract, {name: array[list(rows)] for name, array in inputs.items()})
    keys = Keys(contract).of(raws_of(contract, dict(chosen)), len(rows))
    outputs = Session(bundle).run(chosen)
    columns = [
        row_slices(to_raw(outputs[spec.name], spec.datatype), spec.datatype, len(rows), spec.elements)
        for spec in contract.outputs
    ]
    records = Records(contract)
    shapes = [spec.shape for spec in contract.outputs]
    return {key: records.join([column[i] for column in columns], shapes) for i, key in enumerate(keys)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    """Two inputs, three outputs, text among both."""
    return write_function(tmp_path_factory.mktemp("service"), MODEL, inputs=INPUTS, outputs=OUTPUTS)


def some_rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    words = np.array([f"w{rng.integers(9)}" + "é" * int(rng.integers(3)) for _ in range(count)], dtype=object)
    return {"x": rng.normal(size=(count, 2)).astype(np.float32), "word": words}


@given(rows=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_any_mixture_of_baked_and_unbaked_rows_answers_what_the_model_does(
    bundle: StoredBundle, rows: int, seed: int, data: st.DataObject
) -> None:
    inputs = some_rows(rows, seed)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), unique=True).map(sorted))
    raws = raws_of(bundle.contract, inputs)
    dynamic = Service(bundle, "dynamic").ask(raws, rows)
    entries = baked(bundle, inputs, chosen)
    hybrid = Service(bundle, "hybrid", entries).ask(raws, rows)
    assert [bytes(raw) for raw in hybrid.raws] == [bytes(raw) for raw in dynamic.raws]
    assert tuple(hybrid.shapes) == tuple(dynamic.shapes) == ((2,), (), ())
    keys = Keys(bundle.contract).of(raws, rows)
    assert hybrid.baked_rows == sum(key in entries for key in keys)
    assert (dynamic.baked_rows, hybrid.rows) == (0, rows)
    if hybrid.baked_rows == rows:
        static = Service(bundle, "static", entries).ask(raws, rows)
        assert list(static.raws) == list(dynamic.raws)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    """The answer is as long as the row says; one row at a time, as such models want it."""
    return write_function(
        tmp_path_factory.mktemp("open"),
        "import numpy as np\ndef predict(n):\n    return np.arange(n[0, 0], dtype=np.float32)[None]\n",
        inputs=(TensorSpec("n", "INT64", (1,)),),
        outputs=(TensorSpec("y", "FP32", (-1,)),),
        batch=Batch(dimension="one"),
    )


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6), data=st.data())
def test_rows_of_open_shapes_are_put_together_only_where_they_fit(
    lengths: StoredBundle, sizes: list[int], data: st.DataObject
) -> None:
    raws = [struct.pack(f"<{len(sizes)}q", *sizes)]
    keys = Keys(lengths.contract).of(raws, len(sizes))
    records = Records(lengths.contract)
    entries = {
        key: records.join([np.arange(size, dtype=np.float32).tobytes()], [(size,)])
        for key, size in zip(keys, sizes, strict=True)
        if data.draw(st.booleans())
    }
    service = Service(lengths, "hybrid", entries)
    if len(set(sizes)) > 1:
        with pytest.raises(ParbakeError, match="different shapes"):
            service.ask(raws, len(sizes))
        return
    answer = service.ask(raws, len(sizes))
    assert answer.raws[0] == np.arange(sizes[0], dtype=np.float32).tobytes() * len(sizes)
    assert tuple(answer.shapes) == ((sizes[0],),)


def test_static_says_which_row_is_not_baked(bundle: StoredBundle) -> None:
    inputs = some_rows(3)
    entries = baked(bundle, inputs, [0, 2])
    with pytest.raises(
        KeyNotBaked, match=r"row 1 \(key [0-9a-f]{12}\.\.\., made of the whole row\).*has 2 keys"
    ) as caught:
        Service(bundle, "static", entries).ask(raws_of(bundle.contract, inputs), 3)
    assert "hybrid mode" in caught.value.hint


def test_static_answers_the_declared_default(tmp_path: Path) -> None:
    default = {"score": [0.5, -0.5], "shout": "NOBODY", "size": 0}
    bundle = write_function(tmp_path, MODEL, inputs=INPUTS, outputs=OUTPUTS, default=default)
    inputs = some_rows(3)
    service = Service(bundle, "static", baked(bundle, inputs, [1]))
    answer = service.ask(raws_of(bundle.contract, inputs), 3)
    scores = np.frombuffer(answer.raws[0], np.float32).reshape(3, 2)
    assert scores[0].tolist() == scores[2].tolist() == [0.5, -0.5]
    assert scores[1].tolist() != [0.5, -0.5]
    assert answer.baked_rows == 1
    lone = service.ask(
        [raw[: len(raw) // 3] for raw in raws_of(bundle.contract, {**inputs, "word": np.array(["a"] * 3)})], 1
    )
    assert lone.raws[1] == struct.pack("<I", 6) + b"NOBODY"
    assert lone.baked_rows == 0


def test_a_default_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    contract = write_function(
        tmp_path, MODEL, inputs=INPUTS, outputs=OUTPUTS, default={"score": [0.5], "shout": "", "size": 0}
    ).contract
    with pytest.raises(ValueError, match="the default of 'score' has shape"):
        default_record(contract, Records(contract))


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    """Inputs are rounded: one to a decimal, one to none."""
    return write_function(
        tmp_path_factory.mktemp("rounding"),
        "def predict(x):\n    return x * 3\n",
        key=Key(rounding={"left": 1, "right": 0}),
    )


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(-5, 5)), min_size=1, max_size=5),
    st.floats(-0.04, 0.04),
)
def test_rounding_holds_for_key_and_model_in_every_mode(
    rounding: StoredBundle, values: list[tuple[int, int]], noise: float
) -> None:
    # Zero, too: what is a little below it and what is a little above it are one key.
    exact = np.array([[left / 10, right] for left, right in values], np.float32)
    near = (exact + np.float32(noise)).astype(np.float32)
    entries = baked(rounding, {"x": exact}, range(len(values)))
    dynamic = Service(rounding, "dynamic").ask([near.tobytes()], len(values))
    hybrid = Service(rounding, "hybrid", entries).ask([near.tobytes()], len(values))
    assert np.array_equal(np.frombuffer(dynamic.raws[0], np.float32).reshape(-1, 2), exact * np.float32(3))
    assert hybrid.baked_rows == len(values)
    assert hybrid.raws == [bytes(raw) for raw in dynamic.raws]


def test_an_entity_key_needs_only_its_own_columns(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, MODEL, inputs=INPUTS, outputs=OUTPUTS, key=Key(columns=("word",)))
    inputs = {"x": np.array([[1.0, 2.0]], np.float32), "word": np.array(["store"], dtype=object)}
    entries = baked(bundle, inputs, [0])
    static = Service(bundle, "static", entries)
    assert static.served.needed == (1,)
    word = raws_of(bundle.contract, inputs)[1]
    assert static.ask([b"", word], 1).raws[1] == struct.pack("<I", 6) + b"STORE!"
    # In hybrid mode the entity decides as well, whatever the other columns say.
    other = np.array([[9.0, 9.0]], np.float32).tobytes()
    hybrid = Service(bundle, "hybrid", entries)
    assert hybrid.served.needed == (0, 1)
    assert hybrid.ask([other, word], 1).baked_rows == 1


def test_what_is_unloaded_or_has_no_model_says_so(bundle: StoredBundle) -> None:
    inputs = raws_of(bundle.contract, some_rows(1))
    service = Service(bundle, "dynamic")
    assert service.served.ready
    service.served.closed = True
    assert not service.served.ready
    with pytest.raises(NotReady, match="was unloaded"):
        service.ask(inputs, 1)
    hybrid = Service(bundle, "hybrid", {})
    hybrid.served.batcher = None
    assert not hybrid.served.ready
    with pytest.raises(NotReady, match="is not loaded"):
        hybrid.ask(inputs, 1)


def test_while_the_model_is_down_baked_rows_are_answered(bundle: StoredBundle) -> None:
    inputs = some_rows(2)
    raws = raws_of(bundle.contract, inputs)
    service = Service(bundle, "hybrid", baked(bundle, inputs, [0, 1]))
    batcher = service.served.batcher
    assert batcher is not None
    batcher.down = True
    assert service.ask(raws, 2).baked_rows == 2
    fresh = some_rows(2, seed=5)
    with pytest.raises(RunnerDown):
        service.ask(raws_of(bundle.contract, fresh), 2)
    mixed = {name: np.concatenate([inputs[name][:1], fresh[name][:1]]) for name in inputs}
    with pytest.raises(RunnerDown):
        service.ask(raws_of(bundle.contract, mixed), 2)


@pytest.mark.parametrize("mode", ["dynamic", "static", "hybrid"])
def test_what_is_noted_is_the_key_of_the_contract_in_every_mode(tmp_path: Path, mode: Mode) -> None:
    entity = write_function(tmp_path, MODEL, inputs=INPUTS, outputs=OUTPUTS, key=Key(columns=("word",)))
    contract = entity.contract
    inputs = some_rows(6)
    raws = raws_of(contract, inputs)
    entries = baked(entity, inputs, range(6))
    recorder = Recorder("m", "1", mode, entity.digest)
    head = Head(most_rows=10, most_bytes=1 << 20, clock=lambda: 0.0) if mode == "hybrid" else None
    service = Service(entity, mode, entries if mode == "static" else None, head=head, recorder=recorder)
    for _ in range(2):
        service.ask(raws, 6)
    noted = recorder.drain()
    assert noted is not None
    assert noted.keys() == 2 * Keys(contract).of(raws, 6)


def test_an_input_that_was_left_out_is_noted_as_empty(tmp_path: Path) -> None:
    spec = (TensorSpec("id", "INT64"), TensorSpec("word", "BYTES"))
    source = "def predict(id, word):\n    return id * 2\n"
    entity = write_function(
        tmp_path, source, inputs=spec, outputs=(TensorSpec("y", "INT64"),), key=Key(columns=("id",))
    )
    inputs = {"id": np.arange(3), "word": np.array(["a", "b", "c"], dtype=object)}
    recorder = Recorder("m", "1", "static", entity.digest, wants_inputs=True)
    service = Service(entity, "static", baked(entity, inputs, range(3)), recorder=recorder)
    answer = service.ask([to_raw(inputs["id"], "INT64"), b""], 3)
    assert np.frombuffer(answer.raws[0], np.int64).tolist() == [0, 2, 4]
    noted = recorder.drain()
    assert noted is not None
    assert [list(extra or ()) for extra in noted.extras] == [
        [b"\0" * 8, b""],
        [b"\1" + b"\0" * 7, b""],
        [b"\2" + b"\0" * 7, b""],
    ]
