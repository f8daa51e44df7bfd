"""The Open Inference Protocol's datatypes and what they are in numpy, ONNX and bytes."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
]  # fmt: skip

NUMPY: Final[dict[str, np.dtype[np.generic]]] = {
    "BOOL": np.dtype("bool"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
}

# How onnxruntime spells the same types.
ONNX: Final[dict[str, Datatype]] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

FLOATS: Final = frozenset({"FP16", "FP32", "FP64"})
INTEGERS: Final = frozenset({"UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"})


def datatype_of(array: npt.NDArray[np.generic]) -> Datatype:
    """The protocol's datatype of a numpy array; strings and objects are ``BYTES``.

    Raises ValueError for a dtype the protocol has no word for (complex, datetime, ...).
    """
    if array.dtype.kind in "OSUT":
        return "BYTES"
    for name, dtype in NUMPY.items():
        if array.dtype == dtype:
            return name  # type: ignore[return-value]  # the keys of NUMPY are the literals
    raise ValueError(f"no tensor datatype for numpy dtype {array.dtype}")
