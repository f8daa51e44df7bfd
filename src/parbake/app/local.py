"""A bundle in this process: ``parbake.load(path).predict(rows)``, the same bits as the server's."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.contract.datatypes import NUMPY
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.rounding import round_inputs
from parbake.contract.rows import to_tensors
from parbake.contract.tensors import Tensor, as_text
from parbake.runtime.runner import check_environment
from parbake.runtime.session import Session, check_goldens


class Bundle:
    """A packed model, as `parbake.pack` and `parbake.load` give it.

    It is loaded, and held against its goldens, at the first prediction.
    Safe to use from several threads; one prediction runs at a time.
    """

    def __init__(
        self,
        stored: StoredBundle,
        *,
        allow_pickle: bool = False,
        allow_mismatch: bool = False,
        threads: int = 1,
    ) -> None:
        self._stored = stored
        self._allow_pickle = allow_pickle
        self._allow_mismatch = allow_mismatch
        self._threads = threads
        self._session: Session | None = None
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The folder of the bundle."""
        return self._stored.path

    @property
    def contract(self) -> Contract:
        """What the model promises: inputs, outputs, key, tolerance, purpose, owner, ..."""
        return self._stored.contract

    @property
    def digest(self) -> str:
        """``sha256:...`` over all files of the bundle."""
        return self._stored.digest

    def predict(self, rows: object) -> dict[str, Tensor]:
        """Predictions for some rows, by output name; the first axis of each is the row.

        ``rows`` is an array or nested list (for a single input), a dict of arrays by input or column, a
        dict of single values (one row), a list of dicts by column, a DataFrame, or a pyarrow Table.
        Strings come back as objects of str. Raises `InvalidInput` with the path of the fault,
        `RowRejected` or `ModelFailed` for what the model says, `BundleError` where it cannot be loaded.
        """
        contract = self.contract
        tensors, count = to_tensors(rows, contract.inputs)
        if count == 0:
            return {spec.name: _empty(spec) for spec in contract.outputs}
        rounded = round_inputs(contract, tensors)
        with self._lock:
            session = self._session or self._open()
            parts = [
                session.run(
                    {name: array[at : at + contract.batch.max_rows] for name, array in rounded.items()}
                )
                for at in range(0, count, contract.batch.max_rows)
            ]
        answer: dict[str, Tensor] = {}
        for spec in contract.outputs:
            arrays = [_in_contract(part[spec.name], spec) for part in parts]
            answer[spec.name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return answer

    def _open(self) -> Session:
        check_environment(self._stored.environment, self._allow_mismatch)
        session = Session(self._stored, threads=self._threads, allow_pickle=self._allow_pickle)
        check_goldens(session, self._stored)
        self._session = session
        return session

    def __repr__(self) -> str:
        return f"<Bundle {self.contract.name} {self.digest[:19]} at {self.path}>"


def load(
    path: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    allow_mismatch: bool = False,
    threads: int = 1,
) -> Bundle:
    """Read a bundle and verify its digest.

    ``allow_pickle`` loads bundles that hold a pickle (it can run any code), ``allow_mismatch`` those whose
    required libraries have other versions here. Raises `BundleTorn`, `BundleAltered` or `BundleTooNew`.
    """
    return Bundle(
        read_bundle(Path(path)), allow_pickle=allow_pickle, allow_mismatch=allow_mismatch, threads=threads
    )


def _in_contract(array: Tensor, spec: TensorSpec) -> Tensor:
    if spec.datatype == "BYTES":
        values = array if array.dtype == object else array.astype(object)
        try:
            return as_text(values)
        except UnicodeDecodeError:
            return values
    return np.asarray(array, dtype=NUMPY[spec.datatype])


def _empty(spec: TensorSpec) -> Tensor:
    return np.empty((0, *(max(size, 0) for size in spec.shape)), dtype=NUMPY[spec.datatype])
