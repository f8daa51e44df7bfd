"""The key of a row: 128 bits of BLAKE2b over the row's canonical bytes.

Canonical bytes are the raw bytes of the row's tensors (see `parbake.contract.tensors`) in the order of
the contract, of all inputs (row key) or of the declared columns (entity key). BLAKE2b (RFC 7693), not a
faster unkeyed hash: whoever could make two rows collide could be given another row's answer.

IEEE 754 has many bit patterns that are NaN. For a key they are one, the usual one (positive, quiet, no payload):
whoever sends a missing value should not have to know which of them another library writes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from parbake.contract.datatypes import FLOATS, NUMPY
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.tensors import Tensor, row_slices, to_raw
from parbake.errors import PackRefused

KEY_BYTES: Final = 16

# To copy a hash that has begun costs a third less than to begin another.
_begun: Final = blake2b(digest_size=KEY_BYTES)


def key_of(canonical: bytes) -> bytes:
    """The key of one row's canonical bytes."""
    row = _begun.copy()
    row.update(canonical)
    return row.digest()


class Keys:
    """Computes the keys of a request's rows.

    ``inputs`` are the positions (in the contract) of the inputs that a key needs: all of them for a row
    key, those that hold the declared columns for an entity key. ``whole_row`` makes row keys of any contract.
    """

    def __init__(self, contract: Contract, *, whole_row: bool = False) -> None:
        self._specs = contract.inputs
        self._parts: list[tuple[int, TensorSpec, tuple[slice, ...] | None]] = []
        if contract.key.columns and not whole_row:
            for column in contract.key.columns:
                self._parts.append(_locate(contract, column))
        else:
            self._parts = [(i, spec, None) for i, spec in enumerate(contract.inputs)]
        self.inputs = tuple(dict.fromkeys(i for i, _, _ in self._parts))
        # Elsewhere NaN is refused before anybody asks for its key.
        self._with_nan = tuple(
            i for i in self.inputs if self._specs[i].allow_nan and self._specs[i].datatype in FLOATS
        )
        # One matrix or column of fixed size: its bytes are the canonical bytes as they stand.
        self.plain = len(self._parts) == 1 and self._parts[0][2] is None and self._parts[0][1].fixed

    def of(
        self, raws: Sequence[bytes], rows: int, shapes: Sequence[Sequence[int]] | None = None
    ) -> list[bytes]:
        """Keys of ``rows`` rows, given each input's raw bytes in contract order.

        ``shapes`` are the row shapes, needed where the contract leaves a size open.
        """
        if self._with_nan:
            raws = self._one_nan(raws)
        if self.plain:
            index, spec, _ = self._parts[0]
            if rows == 1:
                row = _begun.copy()
                row.update(raws[index])
                return [row.digest()]
            return [key_of(row) for row in row_slices(raws[index], spec.datatype, rows, spec.elements)]
        columns: list[list[bytes]] = []
        for index, spec, cut in self._parts:
            shape = spec.shape if spec.fixed or shapes is None else shapes[index]
            slices = row_slices(raws[index], spec.datatype, rows, math.prod(shape))
            if cut is not None:
                slices = [b"".join(_pick(row, spec, cut)) for row in slices]
            if not spec.fixed:
                # Two shapes may hold the same bytes.
                prefix = struct.pack(f"<{len(shape)}q", *shape)
                slices = [prefix + row for row in slices]
            columns.append(slices)
        return [key_of(b"".join(parts)) for parts in zip(*columns, strict=True)]

    def of_tensors(self, tensors: Sequence[Tensor], rows: int) -> bytes:
        """The same keys one after another, given each input as a tensor: quicker for many rows of fixed size."""
        columns: list[npt.NDArray[np.uint8]] = []
        for index, spec, cut in self._parts:
            if spec.row_bytes is None:
                raws = [
                    to_raw(array, spec.datatype) for array, spec in zip(tensors, self._specs, strict=True)
                ]
                return b"".join(self.of(raws, rows, [array.shape[1:] for array in tensors]))
            values = np.asarray(tensors[index], dtype=NUMPY[spec.datatype]).reshape(rows, spec.elements)
            if index in self._with_nan:
                values = _usual_nan(values)
            for part in cut or (slice(None),):
                columns.append(np.ascontiguousarray(values[:, part]).view(np.uint8).reshape(rows, -1))
        matrix = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        size = matrix.shape[1]
        if not size:
            return key_of(b"") * rows
        found: list[bytes] = []
        begun = _begun.copy
        for (canonical,) in struct.iter_unpack(f"{size}s", matrix.reshape(-1).data):
            row = begun()
            row.update(canonical)
            found.append(row.digest())
        return b"".join(found)

    def _one_nan(self, raws: Sequence[bytes]) -> Sequence[bytes]:
        """The raw bytes with one NaN for all; the same where there is none."""
        changed = list(raws)
        for index in self._with_nan:
            values = np.frombuffer(raws[index], NUMPY[self._specs[index].datatype])
            usual = _usual_nan(values)
            if usual is not values:
                changed[index] = usual.tobytes()
        return changed


def _usual_nan(values: Tensor) -> Tensor:
    missing = np.isnan(values)
    return np.where(missing, values.dtype.type(np.nan), values) if missing.any() else values


def _locate(contract: Contract, column: str) -> tuple[int, TensorSpec, tuple[slice, ...] | None]:
    for index, spec in enumerate(contract.inputs):
        if spec.name == column:
            return index, spec, None
        if column in spec.columns:
            at = spec.columns.index(column)
            return index, spec, (slice(at, at + 1),)
    names = [name for spec in contract.inputs for name in (spec.columns or (spec.name,))]
    raise PackRefused(f"key column {column!r} is not an input", hint=f"inputs are {', '.join(names)}")


def _pick(row: bytes, spec: TensorSpec, cut: tuple[slice, ...]) -> list[bytes]:
    if spec.datatype == "BYTES":
        elements = row_slices(row, "BYTES", spec.elements, 1)
        return [piece for part in cut for piece in elements[part]]
    size = NUMPY[spec.datatype].itemsize
    return [row[part.start * size : part.stop * size] for part in cut]
