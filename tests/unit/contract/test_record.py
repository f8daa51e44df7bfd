"""Records of baked answers: any outputs come back, and a torn record is a ValueError."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import Contract, Step, TensorSpec
from parbake.contract.record import Records

FIXED = (TensorSpec("score", "FP64"), TensorSpec("pair", "INT16", (2,)))
TEXT = (TensorSpec("label", "BYTES", (1,)), TensorSpec("score", "FP32"))
OPEN = (TensorSpec("series", "FP32", (-1, 2)), TensorSpec("label", "BYTES"))


def records(outputs: tuple[TensorSpec, ...]) -> Records:
    """The records of a model with these outputs."""
    return Records(Contract("m", (), outputs, (Step("onnx", "model.onnx"),), "p", "o"))


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=4, max_size=4))
def test_fixed_outputs_are_their_bytes_and_nothing_more(score: bytes, pair: bytes) -> None:
    codec = records(FIXED)
    record = codec.join([score, pair], [(), (2,)])
    assert record == score + pair
    assert codec.split(record) == ([score, pair], ((), (2,)))


@given(st.binary(max_size=20), st.binary(min_size=4, max_size=4))
def test_strings_come_back(label: bytes, score: bytes) -> None:
    codec = records(TEXT)
    assert codec.split(codec.join([label, score], [(1,), ()])) == ([label, score], ((1,), ()))


@given(st.integers(0, 3), st.binary(max_size=9))
def test_open_shapes_come_back(length: int, label: bytes) -> None:
    codec = records(OPEN)
    series = b"\0" * 8 * length
    record = codec.join([series, label], [(length, 2), ()])
    assert codec.split(record) == ([series, label], ((length, 2), ()))


@given(st.sampled_from([FIXED, TEXT, OPEN, FIXED[:1]]), st.binary(max_size=60))
def test_any_bytes_are_a_record_or_a_value_error(outputs: tuple[TensorSpec, ...], record: bytes) -> None:
    try:
        raws, shapes = records(outputs).split(record)
    except ValueError:
        return
    assert len(raws) == len(shapes) == len(outputs)


@given(st.binary(max_size=9), st.integers(0, 60))
def test_a_record_cut_short_is_a_value_error(label: bytes, cut: int) -> None:
    codec = records(TEXT)
    record = codec.join([label, b"\0\0\0\0"], [(1,), ()])
    if cut < len(record):
        try:
            codec.split(record[:cut])
        except ValueError:
            return
        raise AssertionError(f"{record[:cut]!r} was taken for a record")
