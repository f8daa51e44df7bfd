"""Tensors as raw bytes: the one encoding that wire, runner, goldens, keys and tables share.

A tensor of fixed-size elements is its little-endian, row-major bytes. A ``BYTES`` tensor is its
elements one after another, each behind its length as a little-endian uint32 (the Open Inference
Protocol's binary form). Either way the rows of two tensors are put together by joining their bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from parbake.contract.datatypes import NUMPY

Tensor = npt.NDArray[Any]
"""One tensor; the first axis is the row, except where the contract declares no batch dimension."""

Tensors = Mapping[str, Tensor]

Shape = tuple[int, ...]

_LENGTH = struct.Struct("<I")


def to_raw(array: Tensor, datatype: str) -> bytes:
    """The raw bytes of a tensor. Strings are encoded as UTF-8, bytes are taken as they are."""
    if datatype == "BYTES":
        parts: list[bytes] = []
        for item in array.reshape(-1).tolist():
            data = item if isinstance(item, bytes) else str(item).encode()
            parts.append(_LENGTH.pack(len(data)))
            parts.append(data)
        return b"".join(parts)
    return np.ascontiguousarray(array, dtype=NUMPY[datatype]).tobytes()


def from_raw(raw: bytes | memoryview, datatype: str, shape: Sequence[int]) -> Tensor:
    """The tensor of raw bytes (read-only where elements have a fixed size; ``BYTES`` as objects of bytes).

    Raises ValueError where the number of bytes does not fit the shape.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        items = split_bytes(raw, count)
        out = np.empty(count, dtype=object)
        out[:] = items
        return out.reshape(tuple(shape))
    dtype = NUMPY[datatype]
    if len(raw) != count * dtype.itemsize:
        raise ValueError(
            f"shape {list(shape)} of {datatype} takes {count * dtype.itemsize} bytes, got {len(raw)}"
        )
    return np.frombuffer(raw, dtype=dtype).reshape(tuple(shape))


def split_bytes(raw: bytes | memoryview, count: int) -> list[bytes]:
    """The elements of a raw ``BYTES`` tensor. Raises ValueError where the lengths lie."""
    items: list[bytes] = []
    view = memoryview(raw)
    end = len(view)
    at = 0
    while at < end:
        if len(items) == count:
            raise ValueError(f"{end - at} bytes left over after {count} BYTES elements")
        if at + 4 > end:
            raise ValueError(f"BYTES element {len(items)} is cut short: no room for its length")
        (size,) = _LENGTH.unpack_from(view, at)
        at += 4
        if at + size > end:
            raise ValueError(f"BYTES element {len(items)} claims {size} bytes, {end - at} are left")
        items.append(bytes(view[at : at + size]))
        at += size
    if len(items) != count:
        raise ValueError(f"the shape takes {count} BYTES elements, got {len(items)}")
    return items


def row_slices(raw: bytes, datatype: str, rows: int, elements_per_row: int) -> list[bytes]:
    """The raw bytes of each row of a tensor with ``rows`` rows."""
    if rows == 1:
        return [raw]
    if datatype != "BYTES":
        size = len(raw) // rows if rows else 0
        return [raw[i * size : (i + 1) * size] for i in range(rows)]
    slices: list[bytes] = []
    at = 0
    for _ in range(rows):
        start = at
        for _ in range(elements_per_row):
            (size,) = _LENGTH.unpack_from(raw, at)
            at += 4 + size
        slices.append(raw[start:at])
    return slices


def as_text(array: Tensor) -> Tensor:
    """A ``BYTES`` tensor as str objects, the form that models take. Raises ValueError if not UTF-8."""
    out = np.empty(array.size, dtype=object)
    out[:] = [x.decode() if isinstance(x, bytes) else x for x in array.reshape(-1).tolist()]
    return out.reshape(array.shape)
