"""Which columns of a file make which input of the contract, and a batch of rows as the contract's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from parbake.batch.convert import Faults, scalars, tensor
from parbake.batch.model import Binding, FileLayout
from parbake.contract.datatypes import NUMPY
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.tensors import Tensor
from parbake.errors import InputFileError

_BLOCK_ROWS: Final = 4096


def bind(contract: Contract, names: Sequence[str], file: str) -> tuple[tuple[Binding, ...], tuple[str, ...]]:
    """The columns of each input, and the columns that no input needs.

    A matrix input is made of the columns that its spec names, or of one list column of its own name; any
    other input of the column of its name. Raises `InputFileError` where a column is missing or there twice.
    """
    have = set(names)
    bindings: list[Binding] = []
    for spec in contract.inputs:
        if spec.columns and (spec.name not in have or have.issuperset(spec.columns)):
            absent = [name for name in spec.columns if name not in have]
            if absent:
                raise _absent(absent, spec, names, file)
            bindings.append(Binding(spec.name, spec.columns, matrix=True))
        elif spec.name in have:
            bindings.append(Binding(spec.name, (spec.name,)))
        else:
            raise _absent([spec.name], spec, names, file)
    needed = {name for binding in bindings for name in binding.columns}
    for name in needed:
        if list(names).count(name) > 1:
            raise InputFileError(f"column {name!r} is there twice", path=file, hint="rename one of them")
    return tuple(bindings), tuple(name for name in names if name not in needed)


def to_tensors(
    contract: Contract, layout: FileLayout, batch: Any, faults: Faults
) -> list[Tensor | list[Tensor]]:
    """A batch of rows as tensors in the contract's order; what does not fit is noted in ``faults``.

    ``batch`` is an Arrow RecordBatch that holds `FileLayout.needed`. An input with an open size comes as
    one tensor per row. Raises `InputFileError` where a column has the wrong type.
    """
    text = layout.format == "csv"
    tensors: list[Tensor | list[Tensor]] = []
    for spec, binding in zip(contract.inputs, layout.bindings, strict=True):
        if binding.matrix:
            tensors.append(_matrix(spec, binding, batch, faults, text=text))
        else:
            (column,) = binding.columns
            tensors.append(tensor(batch.column(column), spec, column, faults, text=text))
    return tensors


def _matrix(spec: TensorSpec, binding: Binding, batch: Any, faults: Faults, *, text: bool) -> Tensor:
    columns = [scalars(batch.column(name), spec, name, faults, text=text) for name in binding.columns]
    out = np.empty((batch.num_rows, len(columns)), NUMPY[spec.datatype])
    # Block by block, because a block stays in the processor's cache while all columns are put into it.
    for start in range(0, batch.num_rows, _BLOCK_ROWS):
        block = out[start : start + _BLOCK_ROWS]
        for at, values in enumerate(columns):
            block[:, at] = values[start : start + _BLOCK_ROWS]
    return out


def _absent(absent: Sequence[str], spec: TensorSpec, names: Sequence[str], file: str) -> InputFileError:
    which = ", ".join(map(repr, absent[:5])) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    also = f", or one list column {spec.name!r}" if spec.columns else ""
    return InputFileError(
        f"column {which} is missing, which input {spec.name!r} needs{also}",
        path=file,
        hint=f"the file has {shown}",
    )
