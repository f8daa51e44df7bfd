"""One baked answer as bytes: the outputs of one row, as a prediction table stores them.

Outputs of fixed size stand one after another. If any output has a size of its own (``BYTES``, open
shapes), every output is behind its number of bytes, and an open shape is in front of its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from parbake.contract.model import Contract

_SIZE = struct.Struct("<I")


class Records:
    """Puts the outputs of one row together and takes them apart, as the contract has them."""

    def __init__(self, contract: Contract) -> None:
        self._specs = contract.outputs
        sizes = [spec.row_bytes for spec in contract.outputs]
        self.sizes: list[int] | None = None if None in sizes else [size for size in sizes if size is not None]
        """Bytes of each output where all are fixed, so that a record is their concatenation."""
        self._shapes = tuple(spec.shape for spec in contract.outputs)

    def join(self, raws: Sequence[bytes], shapes: Sequence[Sequence[int]]) -> bytes:
        """The record of one row: each output's raw bytes and row shape."""
        if self.sizes is not None:
            return raws[0] if len(raws) == 1 else b"".join(raws)
        parts: list[bytes] = []
        for spec, raw, shape in zip(self._specs, raws, shapes, strict=True):
            if not spec.fixed:
                parts.append(struct.pack(f"<B{len(shape)}q", len(shape), *shape))
            parts.append(_SIZE.pack(len(raw)))
            parts.append(raw)
        return b"".join(parts)

    def split(self, record: bytes) -> tuple[list[bytes], tuple[tuple[int, ...], ...]]:
        """Raw bytes and row shapes of each output. Raises ValueError for a torn record."""
        if self.sizes is not None:
            if len(record) != sum(self.sizes):
                raise ValueError(f"a record has {len(record)} bytes, the contract says {sum(self.sizes)}")
            if len(self.sizes) == 1:
                return [record], self._shapes
            raws: list[bytes] = []
            at = 0
            for size in self.sizes:
                raws.append(record[at : at + size])
                at += size
            return raws, self._shapes
        raws, shapes, at = [], [], 0
        try:
            for spec in self._specs:
                shape = spec.shape
                if not spec.fixed:
                    count = record[at]
                    shape = struct.unpack_from(f"<{count}q", record, at + 1)
                    at += 1 + 8 * count
                (size,) = _SIZE.unpack_from(record, at)
                at += 4
                if at + size > len(record):
                    raise ValueError(f"a record is cut short at byte {at}")
                raws.append(record[at : at + size])
                shapes.append(tuple(shape))
                at += size
        except (struct.error, IndexError) as error:
            raise ValueError(f"a record is cut short: {error}") from error
        return raws, tuple(shapes)
