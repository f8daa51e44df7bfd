"""What a source framework hands over to be packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from parbake.contract.model import Step, TensorSpec
from parbake.contract.tensors import Tensors

Predict = Callable[[Tensors], Mapping[str, npt.NDArray[np.generic]]]


@dataclass(frozen=True, slots=True)
class Source:
    """A trained model, converted but not yet proven.

    ``predict`` is the source framework's own answer for the same tensors (first axis: the row), by
    output name; it is what the bundle is held against. ``thresholds`` are values at which the model is
    known to decide, by input name and, for a matrix input, by position: packing probes at and around them.
    """

    framework: str
    framework_version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    files: Mapping[str, bytes]
    predict: Predict
    example: Tensors
    thresholds: Mapping[tuple[str, int], Sequence[float]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    """Distributions that the bundle's own code imports."""
    batch_dimension: str = "any"
    own_runtime: bool = False
    """Whether ``predict`` is the bundle's own runtime (an ONNX file): nothing was converted."""
    rtol: float | None = None
    atol: float | None = None
    """The tolerance that this conversion can promise, where it is not the datatype's default."""
    smooth: bool = False
    """Whether labels come from scores (networks, linear models), so that rounding decides them at a tie."""
