"""Run a bundle in this process: its steps in order, each row's bits independent of its company."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, Final

import numpy as np

from parbake.contract.bundle import StoredBundle
from parbake.contract.datatypes import INTEGERS, NUMPY
from parbake.contract.model import Batch, TensorSpec
from parbake.contract.tensors import Tensor, Tensors, from_raw, to_raw
from parbake.errors import GoldensDiffer, ModelFailed
from parbake.runtime.steps import BoundRow, OnnxStep, StepRunner, open_step

_BOUND_S: Final = 0.001
"""A call that takes longer has nothing to gain by it."""


class Session:
    """The steps of one bundle, loaded. Not safe for concurrent calls; free it by dropping it.

    ``threads`` is the number of threads one call may use; a contract whose bits depend on it gets one.
    Raises `BundleError` where a step cannot be loaded.
    """

    def __init__(
        self,
        bundle: StoredBundle,
        *,
        threads: int = 1,
        allow_pickle: bool = False,
        batch: Batch | None = None,
    ) -> None:
        contract = bundle.contract
        self.contract = contract
        self.digest = bundle.digest
        self._batch = batch or contract.batch
        if self._batch.one_thread:
            threads = 1
        self._steps: list[StepRunner] = [
            open_step(bundle, step, threads=threads, allow_pickle=allow_pickle) for step in contract.steps
        ]
        self._inputs = contract.inputs
        self._outputs = contract.outputs
        self._output_names = [spec.name for spec in contract.outputs]
        self._output_shapes = [spec.shape for spec in contract.outputs]
        self._least = self._batch.invariant_from or 1
        self._multiple = max(1, self._batch.multiple_of)
        self._plain = self._plain_step()
        self._bound: BoundRow | None = None
        """The way of single rows, once it has been tried and gave the same bits."""
        self._to_bind = all(spec.fixed and spec.elements for spec in (*self._inputs, *self._outputs))

    def _plain_step(self) -> OnnxStep | None:
        """The only step, where a batch of any size goes through it as it stands: for most models it does."""
        step = self._steps[0]
        names = [spec.name for spec in self._inputs], [spec.name for spec in self._outputs]
        if (
            len(self._steps) == 1
            and isinstance(step, OnnxStep)
            and step.takes(*names)
            and self._batch.dimension == "any"
            and self._least == self._multiple == 1
            and all(spec.row_bytes is not None for spec in (*self._inputs, *self._outputs))
        ):
            return step
        return None

    def with_batch(self, batch: Batch) -> Session:
        """The same steps, loaded once, under another batch policy (but for ``one_thread``)."""
        other = copy.copy(self)
        other._batch = batch
        other._least = batch.invariant_from or 1
        other._multiple = max(1, batch.multiple_of)
        other._plain = other._plain_step()
        other._to_bind = self._to_bind or self._bound is not None
        other._bound = None
        return other

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        """Outputs by name for inputs by name; the first axis of each is the row, of any number from 1.

        Raises `RowRejected` or `ModelFailed`.
        """
        rows = len(inputs[self._inputs[0].name]) if self._inputs else 1
        dimension = self._batch.dimension
        if dimension == "any":
            size = -(-max(rows, self._least) // self._multiple) * self._multiple
            if size == rows:
                return self._call(inputs, rows)
            again = np.arange(size) % rows
            padded = {name: array[again] for name, array in inputs.items()}
            return {name: array[:rows] for name, array in self._call(padded, size).items()}
        parts = [self._one({name: array[i : i + 1] for name, array in inputs.items()}) for i in range(rows)]
        if rows == 1:
            return parts[0]
        for spec in self._outputs:
            shapes = {part[spec.name].shape[1:] for part in parts}
            if len(shapes) > 1:
                raise ModelFailed(
                    f"rows of one request have outputs {spec.name!r} of different shapes: {sorted(shapes)}",
                    hint="ask for them in separate requests",
                )
        return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self._outputs}

    def run_raw(
        self, raws: Sequence[bytes], rows: int, shapes: Sequence[Sequence[int]]
    ) -> tuple[list[bytes], list[tuple[int, ...]]]:
        """The same on raw bytes: per input its bytes and row shape; gives the same of each output."""
        plain = self._plain
        if plain is not None and rows:
            if rows == 1 and self._bound is not None:
                # Where it fails the other way says what is wrong.
                with suppress(Exception):
                    return self._bound.run(raws), self._output_shapes
            started = perf_counter()
            feed = {
                spec.name: np.frombuffer(raw, NUMPY[spec.datatype]).reshape(rows, *shape)
                for spec, raw, shape in zip(self._inputs, raws, shapes, strict=True)
            }
            arrays = plain.run(self._output_names, feed)
            if all(
                array.shape == (rows, *spec.shape) and array.dtype == NUMPY[spec.datatype]
                for spec, array in zip(self._outputs, arrays, strict=True)
            ):
                out = [array.tobytes() for array in arrays]
                if rows == 1:
                    self._bind(plain, raws, out, perf_counter() - started)
                return out, self._output_shapes
            # The long way says what is wrong, or puts it right.
        inputs = {
            spec.name: from_raw(raw, spec.datatype, (rows, *shape))
            for spec, raw, shape in zip(self._inputs, raws, shapes, strict=True)
        }
        outputs = self.run(inputs)
        out_raws: list[bytes] = []
        out_shapes: list[tuple[int, ...]] = []
        for spec in self._outputs:
            array = outputs[spec.name]
            out_raws.append(to_raw(array, spec.datatype))
            out_shapes.append(tuple(array.shape[1:]))
        return out_raws, out_shapes

    def _bind(self, plain: OnnxStep, raws: Sequence[bytes], out: list[bytes], seconds: float) -> None:
        """Find the quicker way for single rows, given one with its answer; where it just failed there is none."""
        to_bind, self._to_bind, self._bound = self._to_bind and seconds < _BOUND_S, False, None
        if to_bind:
            with suppress(Exception):
                bound = plain.bound(self._inputs, self._outputs)
                if bound.run(raws) == out:
                    self._bound = bound

    def _one(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """One row (with its axis) of a model without a free batch dimension."""
        if self._batch.dimension == "one":
            return self._call(row, 1)
        outputs = self._through({name: array.reshape(array.shape[1:]) for name, array in row.items()})
        return self._in_contract({name: array[np.newaxis] for name, array in outputs.items()}, 1)

    def _call(self, inputs: Tensors, rows: int) -> dict[str, Tensor]:
        return self._in_contract(self._through(inputs), rows)

    def _in_contract(self, outputs: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        """The outputs, each with the row as first axis and then the shape and datatype that the contract says.

        Raises `ModelFailed` where an output has another shape (cut into rows, it would answer one row with
        another's), or a datatype that loses what the model said (20/3 would be answered as 6).
        """
        for spec in self._outputs:
            array = outputs[spec.name]
            if array.ndim == 0 or len(array) != rows:
                raise ModelFailed(
                    f"output {spec.name!r} has shape {list(array.shape)} for {rows} rows",
                    hint="the first axis of every output must be the row",
                )
            if array.dtype != NUMPY[spec.datatype]:
                array = outputs[spec.name] = _as_promised(array, spec)
            row = array.shape[1:]
            if row == spec.shape:
                continue
            if spec.fixed and math.prod(row) == spec.elements:
                outputs[spec.name] = array.reshape((rows, *spec.shape))
            elif len(row) != len(spec.shape) or any(
                want not in (-1, have) for want, have in zip(spec.shape, row, strict=True)
            ):
                raise ModelFailed(
                    f"output {spec.name!r} has rows of shape {list(row)}, the contract says {list(spec.shape)}"
                )
        return outputs

    def _through(self, inputs: Tensors) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(inputs)
        for step in self._steps:
            tensors = step(tensors)
        outputs: dict[str, Tensor] = {}
        for spec in self._outputs:
            if spec.name not in tensors:
                raise ModelFailed(
                    f"the model gave no output {spec.name!r}, but {', '.join(map(repr, tensors))}"
                )
            outputs[spec.name] = tensors[spec.name]
        return outputs


def check_goldens(session: Session, bundle: StoredBundle) -> int:
    """Warm up on the goldens and compare; gives the number of rows. Raises `GoldensDiffer` with the first row."""
    goldens = bundle.goldens()
    rows = goldens.rows
    if rows == 0:
        return 0
    answers = session.run(goldens.inputs)
    for spec in bundle.contract.outputs:
        rtol, atol = bundle.contract.tolerance.rtol, bundle.contract.tolerance.atol
        bad = differing_rows(answers[spec.name], goldens.outputs[spec.name], spec, rtol, atol)
        if len(bad):
            row = int(bad[0])
            raise GoldensDiffer(
                f"{len(bad)} of {rows} goldens differ; first: row {row}, output {spec.name!r}, "
                f"expected {_short(goldens.outputs[spec.name][row])}, got {_short(answers[spec.name][row])}",
                hint="parbake check BUNDLE lists what differs between this machine and the one that packed",
            )
    return rows


def differing_rows(
    got: Tensor, expected: Tensor, spec: TensorSpec, rtol: float, atol: float
) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Indices of rows where ``got`` is not ``expected``: exactly, but for floats within the tolerance."""
    if got.shape != expected.shape:
        return np.arange(max(len(got), len(expected)))
    if spec.datatype == "BYTES":
        left = [_text(x) for x in got.reshape(-1).tolist()]
        right = [_text(x) for x in expected.reshape(-1).tolist()]
        same = np.array([a == b for a, b in zip(left, right, strict=True)], dtype=bool).reshape(got.shape)
    elif got.dtype.kind == "f":
        same = np.isclose(
            got.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True
        )
    else:
        same = got == expected
    return np.flatnonzero(~same.reshape(len(same), -1).all(axis=1))


def _as_promised(array: Tensor, spec: TensorSpec) -> Tensor:
    """An output of another dtype in that of the contract. Raises `ModelFailed` where it does not fit."""
    promised = NUMPY[spec.datatype]
    hint = "return the datatype that the examples gave when packing, whatever the row"
    if spec.datatype == "BYTES":
        if array.dtype.kind in "UST":
            return array.astype(object)
        fits = False
    else:
        integers = spec.datatype in INTEGERS and array.dtype.kind in "iu"
        fits = integers or np.can_cast(array.dtype, promised, "same_kind")
        if integers and array.size:
            limits = np.iinfo(promised)  # type: ignore[type-var]  # an integer dtype
            least, most = int(array.min()), int(array.max())
            if least < limits.min or most > limits.max:
                raise ModelFailed(
                    f"output {spec.name!r} has {least if least < limits.min else most} as {array.dtype}, "
                    f"out of the range of {spec.datatype}, which the contract says",
                    hint=hint,
                )
    if not fits:
        raise ModelFailed(
            f"output {spec.name!r} has datatype {array.dtype}, the contract says {spec.datatype}", hint=hint
        )
    return array.astype(promised)


def _text(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _short(value: object) -> str:
    return np.array2string(np.asarray(value), threshold=8, edgeitems=3, separator=", ")
