"""The keys of many rows at once are those of the rows, whatever the key is made of."""

from __future__ import annotations

import numpy as np
import pytest

from parbake.contract.key import Keys
from parbake.contract.model import Contract, Key, TensorSpec
from parbake.contract.tensors import to_raw

ROWS = 50
MATRIX = TensorSpec("x", "FP32", (3,), columns=("a", "b", "c"))
HALF = TensorSpec("h", "FP16", ())
FLAG = TensorSpec("f", "BOOL", (2, 2))
TEXT = TensorSpec("t", "BYTES", (1,))
OPEN = TensorSpec("o", "INT64", (-1,))
NOTHING = TensorSpec("n", "FP32", (0,))


@pytest.mark.parametrize(
    ("inputs", "key"),
    [
        ((MATRIX,), ()),
        ((MATRIX,), ("c", "a")),
        ((MATRIX, HALF, FLAG), ()),
        ((MATRIX, HALF, FLAG), ("f", "b", "h")),
        ((MATRIX, TEXT), ()),
        ((MATRIX, TEXT), ("t",)),
        ((MATRIX, TEXT), ("b",)),
        ((OPEN,), ()),
        ((OPEN, MATRIX), ("a", "o")),
        ((NOTHING,), ()),
    ],
    ids=lambda value: "+".join(getattr(part, "name", part) for part in value) or "row",
)
def test_keys_of_tensors_are_the_keys_of_their_rows(
    inputs: tuple[TensorSpec, ...], key: tuple[str, ...]
) -> None:
    random = np.random.default_rng(0)
    tensors = []
    for spec in inputs:
        values = random.normal(size=(ROWS, *(4 if size == -1 else size for size in spec.shape)))
        if spec.datatype == "BYTES":
            tensors.append(np.array([[str(value)] for value in values[:, 0]], dtype=object))
        else:
            kinds = {"FP32": np.float32, "FP16": np.float16, "BOOL": np.bool_, "INT64": np.int64}
            tensors.append(
                (values > 0 if spec.datatype == "BOOL" else 9 * values).astype(kinds[spec.datatype])
            )
    contract = Contract("k", inputs, (TensorSpec("y", "FP32"),), (), "p", "o", key=Key(key))
    keys = Keys(contract)
    alone = [
        keys.of(
            [to_raw(t[i : i + 1], spec.datatype) for t, spec in zip(tensors, inputs, strict=True)],
            1,
            [t.shape[1:] for t in tensors],
        )[0]
        for i in range(ROWS)
    ]
    assert keys.of_tensors(tensors, ROWS) == b"".join(alone)
