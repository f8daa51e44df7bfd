"""Call a model row by row where it has no free batch dimension, as the runtime will."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parbake.contract.sources.model import Predict
from parbake.contract.tensors import Tensor, Tensors

Call = Callable[[Tensors], Mapping[str, Tensor]]


def along_rows(call: Call, dimension: str) -> Predict:
    """``call`` as a function of any number of rows (first axis), whatever its batch dimension is.

    ``any``: it takes them all at once; ``one``: it is called with one row at a time (first axis 1);
    ``none``: with one row that has no such axis.
    """
    if dimension == "any":
        return call

    def predict(tensors: Tensors) -> dict[str, Tensor]:
        rows = len(next(iter(tensors.values()))) if tensors else 1
        parts: list[Mapping[str, Any]] = []
        for i in range(rows):
            if dimension == "one":
                answer = call({name: array[i : i + 1] for name, array in tensors.items()})
                parts.append({name: np.asarray(array)[0] for name, array in answer.items()})
            else:
                answer = call({name: np.asarray(array[i]) for name, array in tensors.items()})
                parts.append({name: np.asarray(array) for name, array in answer.items()})
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    return predict
