"""Declared rounding: what makes two almost equal rows one key, applied before key *and* model in every mode."""

from __future__ import annotations

import numpy as np

from parbake.contract.model import Contract
from parbake.contract.tensors import Tensor, Tensors


def round_inputs(contract: Contract, inputs: Tensors) -> Tensors:
    """The inputs with the contract's rounding done, in each input's own datatype (numpy.round: half to even).

    The same tensors come back where the contract declares no rounding.
    """
    rounding = contract.key.rounding
    if not rounding:
        return inputs
    rounded: dict[str, Tensor] = dict(inputs)
    for spec in contract.inputs:
        if spec.name not in inputs:
            continue
        if spec.name in rounding:
            # -0.04 and 0.04 become one key: adding nothing makes zero of minus zero.
            rounded[spec.name] = np.round(inputs[spec.name], rounding[spec.name]) + 0
            continue
        places = [(at, rounding[column]) for at, column in enumerate(spec.columns) if column in rounding]
        if places:
            array = np.array(inputs[spec.name])
            for at, decimals in places:
                array[..., at] = np.round(array[..., at], decimals) + 0
            rounded[spec.name] = array
    return rounded
