"""Columns become tensors where nothing is lost, and rows that do not fit are named."""

from __future__ import annotations

import datetime
import math
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.batch.convert import Faults, tensor
from parbake.contract.model import TensorSpec
from parbake.errors import InputFileError


def _convert(array: Any, spec: TensorSpec, *, text: bool = False) -> tuple[Any, dict[int, str]]:
    faults = Faults()
    values = tensor(array, spec, "c", faults, text=text)
    return values, {at: reason for at, (_, reason, _) in faults.found.items()}


def _spec(datatype: str, shape: tuple[int, ...] = (), *, allow_nan: bool = False) -> TensorSpec:
    return TensorSpec("x", datatype, shape, allow_nan=allow_nan)  # type: ignore[arg-type]  # a literal


@given(st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False), max_size=20))
def test_doubles_are_rounded_as_a_json_request_rounds_them(values: list[float]) -> None:
    got, faults = _convert(pa.array(values, pa.float64()), _spec("FP32"))
    for at, value in enumerate(values):
        try:
            expected = struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            assert faults[at] == f"{np.float64(value)} is too large for FP32"
        else:
            assert struct.pack("<f", got[at]) == struct.pack("<f", expected)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    st.sampled_from(["FP64", "FP32", "INT32", "UINT8"]),
)
def test_integers_pass_only_where_nothing_is_lost(values: list[int], datatype: str) -> None:
    got, faults = _convert(pa.array(values, pa.int64()), _spec(datatype))
    for at, value in enumerate(values):
        if datatype.startswith("FP"):
            lossless = int(float(value)) == value
            expected = np.float64(value).astype(got.dtype)
        else:
            info = np.iinfo(got.dtype)
            lossless = info.min <= value <= info.max
            expected = value
        assert (at not in faults) == lossless
        if lossless:
            assert got[at] == expected


@given(st.lists(st.floats(width=64), max_size=20))
def test_doubles_pass_as_integers_only_where_they_are_whole(values: list[float]) -> None:
    got, faults = _convert(pa.array(values, pa.float64()), _spec("INT64"))
    for at, value in enumerate(values):
        whole = math.isfinite(value) and value == int(value) and -(2**63) <= value < 2**63
        assert (at not in faults) == whole
        if whole:
            assert int(got[at]) == int(value)


TYPES = [
    (pa.array([1, 2], pa.int8()), "FP32", [1, 2]),
    (pa.array([1, 2], pa.uint64()), "FP64", [1, 2]),
    (pa.array([0.5, 2], pa.float16()), "FP32", [0.5, 2]),
    (pa.array([0.5, 2], pa.float64()), "FP16", [0.5, 2]),
    (pa.array(["1.50", "2.25"]).cast(pa.decimal128(5, 2)), "FP64", [1.5, 2.25]),
    (pa.array([True, False, True])[1:], "BOOL", [False, True]),
    (pa.array([7, 8, 9], pa.int32())[1:], "INT64", [8, 9]),
    (pa.array([1.0, 2.0]).dictionary_encode(), "FP32", [1, 2]),
    (pa.array(["a", "b", "a"]).dictionary_encode()[1:], "BYTES", ["b", "a"]),
    (pa.array(["a", "ü"], pa.large_string()), "BYTES", ["a", "ü"]),
    (pa.array(["a", "ü"], pa.string_view()), "BYTES", ["a", "ü"]),
    (pa.array([b"a", b"\xff"], pa.binary()), "BYTES", [b"a", b"\xff"]),
    (pa.array([b"ab", b"cd"], pa.binary(2)), "BYTES", [b"ab", b"cd"]),
    (pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array([3.0, 4.0])), "FP32", [3, 4]),
]


@pytest.mark.parametrize(
    ("array", "datatype", "expected"), TYPES, ids=[f"{a.type} as {d}" for a, d, _ in TYPES]
)
def test_a_column_type_that_can_hold_the_values_is_taken(
    array: Any, datatype: str, expected: list[Any]
) -> None:
    got, faults = _convert(array, _spec(datatype, (1,)))
    assert not faults
    assert got.shape == (2, 1)
    assert got[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("array", "datatype", "hint"),
    [
        (pa.array(["1"]), "FP32", "as FP32"),
        (pa.array([True]), "FP32", "0 and 1"),
        (pa.array([1]), "BOOL", "booleans"),
        (pa.array([1]), "BYTES", "as text"),
        (pa.array([datetime.date(2026, 1, 1)]), "INT64", "times as numbers"),
        (pa.array([{"a": 1}]), "FP32", "as FP32"),
        (pa.array([[1.0]]), "FP32", "as FP32"),
    ],
    ids=["text", "boolean", "number as boolean", "number as text", "time", "struct", "list"],
)
def test_a_column_of_another_kind_is_refused_as_a_whole(array: Any, datatype: str, hint: str) -> None:
    with pytest.raises(InputFileError, match=r"column 'c' is .*, input 'x' wants") as caught:
        _convert(array, _spec(datatype))
    assert hint in caught.value.hint


def test_missing_values_are_faults_unless_the_contract_allows_them() -> None:
    nan = math.nan
    for array in (pa.array([1.0, None, nan]), pa.array([1, None, None])):
        _, faults = _convert(array, _spec("FP32"))
        assert sorted(faults) == [1, 2]
        got, faults = _convert(array, _spec("FP32", allow_nan=True))
        assert not faults
        assert got.tobytes() == np.array([1, nan, nan], np.float32).tobytes()
    _, faults = _convert(pa.array([True, None]), _spec("BOOL", allow_nan=True))
    assert faults == {1: "missing, where the contract wants BOOL"}
    _, faults = _convert(pa.array([1, None]), _spec("INT64", allow_nan=True))
    assert sorted(faults) == [1]
    got, faults = _convert(pa.array(["a", None]), _spec("BYTES", allow_nan=True))
    assert (got.tolist(), faults) == (["a", ""], {})
    got, faults = _convert(pa.nulls(2), _spec("FP32", allow_nan=True))
    assert np.isnan(got).all()
    assert not faults


def test_every_nan_is_the_same_nan_so_that_a_row_has_one_key() -> None:
    odd = np.array([0xFFC00001], np.uint32).view(np.float32)
    got, _ = _convert(pa.array(odd), _spec("FP32", allow_nan=True))
    assert got.tobytes() == np.float32(math.nan).tobytes()


CELLS: list[tuple[str, str, object]] = [
    ("1.5", "FP32", 1.5),
    (" 2 ", "FP32", 2.0),
    ("-3", "INT64", -3),
    ("3.0", "INT64", 3),
    ("18446744073709551615", "UINT64", 2**64 - 1),
    ("true", "BOOL", True),
    ("False", "BOOL", False),
    ("0", "BOOL", False),
    ("", "BYTES", ""),
    ("x", "BYTES", "x"),
    ("x", "FP32", None),
    ("1_000", "FP32", None),
    ("1.5", "INT64", None),
    ("9223372036854775808", "INT64", None),
    ("300", "UINT8", None),
    ("-1", "UINT64", None),
    ("", "FP32", None),
    ("nan", "FP32", None),
    ("1e999", "FP64", None),
    ("maybe", "BOOL", None),
]


@pytest.mark.parametrize(("cell", "datatype", "expected"), CELLS, ids=[f"{c!r} as {d}" for c, d, _ in CELLS])
def test_cells_of_csv_are_read_by_the_contract(cell: str, datatype: str, expected: object) -> None:
    first = {"BYTES": "a", "BOOL": "true"}.get(datatype, "1")
    got, faults = _convert(pa.array([first, cell]), _spec(datatype), text=True)
    if expected is None:
        assert list(faults) == [1]
    else:
        assert not faults
        assert got[1] == expected


def test_lists_make_tensors_nested_or_flat() -> None:
    spec = _spec("FP32", (2, 2))
    nested = pa.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], pa.list_(pa.list_(pa.float64())))
    flat = pa.array([[1, 2, 3, 4], [5, 6, 7, 8]], pa.list_(pa.float32(), 4))
    for array in (
        nested,
        flat,
        flat.cast(pa.large_list(pa.float32())),
        pa.chunked_array([flat[:1], flat[1:]]),
    ):
        got, faults = _convert(array, spec)
        assert not faults
        assert got.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


def test_a_list_of_another_length_or_with_gaps_is_one_rows_fault() -> None:
    array = pa.array([[1, 2], [1], None, [None, 2], [math.inf, 1], [5, 6]], pa.list_(pa.float64()))
    got, faults = _convert(array, _spec("FP32", (2,)))
    assert sorted(faults) == [1, 2, 3, 4]
    assert faults[1] == "1 elements, expected 2"
    assert got[[0, 5]].tolist() == [[1, 2], [5, 6]]


def test_open_shapes_give_one_tensor_per_row() -> None:
    array = pa.array([[1.0], [1.0, 2.0], [], None, [math.nan]], pa.list_(pa.float64()))
    got, faults = _convert(array, _spec("FP32", (-1,)))
    assert [row.tolist() for row in got[:3]] == [[1], [1, 2], []]
    assert sorted(faults) == [3, 4]
    array = pa.array(
        [[[1, 2]], [[1, 2], [3, 4]], [[1, 2, 3]], [[1], [2, 3]], []], pa.list_(pa.list_(pa.int64()))
    )
    got, faults = _convert(array, _spec("INT64", (-1, 2)))
    assert [got[at].shape for at in (0, 1, 4)] == [(1, 2), (2, 2), (0, 2)]
    assert sorted(faults) == [2, 3]


def test_a_single_value_where_a_tensor_is_wanted_is_refused() -> None:
    with pytest.raises(InputFileError, match=r"holds single values, input 'x' wants \[3\] per row"):
        _convert(pa.array([1.0]), _spec("FP32", (3,)))
