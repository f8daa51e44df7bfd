"""The answer that a contract declares for keys that were never baked, as a record."""

from __future__ import annotations

import numpy as np

from parbake.contract.datatypes import NUMPY
from parbake.contract.model import Contract
from parbake.contract.record import Records
from parbake.contract.tensors import to_raw


def default_record(contract: Contract, records: Records) -> bytes | None:
    """The record of `Contract.default`, or None where the contract declares none.

    Raises ValueError where a value does not have the shape of its output.
    """
    if contract.default is None:
        return None
    raws: list[bytes] = []
    shapes: list[tuple[int, ...]] = []
    for spec in contract.outputs:
        array = np.asarray(contract.default[spec.name], dtype=NUMPY[spec.datatype])
        if spec.fixed and array.shape != spec.shape:
            raise ValueError(f"the default of {spec.name!r} has shape {array.shape}, the output {spec.shape}")
        raws.append(to_raw(array, spec.datatype))
        shapes.append(array.shape)
    return records.join(raws, shapes)
