"""What a model promises: the contract and its parts, as frozen values."""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from msgspec import Struct

from parbake.contract.datatypes import NUMPY, Datatype
from parbake.names import NAME_PATTERN as NAME_PATTERN
from parbake.names import Name as Name

FORMAT: Final = 2
"""Format of bundles that this version writes, and the newest it reads. Any new field is a new format, as readers refuse
what they do not know. Format 1 has no operating system, processors, training data and run."""


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One input or output. ``shape`` is that of one row; -1 is any size."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()
    """Names along the only axis of ``shape``; empty where the tensor is one column of its own."""
    unit: str = ""
    allow_nan: bool = False
    """Whether an input accepts NaN and infinities; nothing is refused by that of an output."""
    labels: tuple[str, ...] = ()
    """What the positions of a probability output stand for."""

    @property
    def fixed(self) -> bool:
        """Whether every row has the same shape."""
        return -1 not in self.shape

    @property
    def elements(self) -> int:
        """Elements per row (of a fixed shape)."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int | None:
        """Bytes per row, or None where rows differ in size (``BYTES``, shapes with -1)."""
        if self.datatype == "BYTES" or not self.fixed:
            return None
        return self.elements * NUMPY[self.datatype].itemsize


class Key(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What identifies a row in a prediction table."""

    columns: tuple[str, ...] = ()
    """The inputs (or columns of a matrix input) that make the entity; empty: the row itself is the key."""
    rounding: dict[str, int] = {}
    """Decimals to which an input or column is rounded, before the key *and* before the model."""

    @property
    def kind(self) -> Literal["row", "entity"]:
        """``entity`` where columns are named, else ``row``."""
        return "entity" if self.columns else "row"


class Tolerance(Struct, frozen=True, forbid_unknown_fields=True):
    """Largest allowed difference, ``atol + rtol * |expected|`` as numpy.isclose has it.

    Applies to floating-point outputs; integers, booleans and strings must be equal.
    """

    rtol: float = 0.0
    atol: float = 0.0


class Batch(Struct, frozen=True, forbid_unknown_fields=True):
    """How rows may be put together, as measured when packing."""

    dimension: Literal["any", "one", "none"] = "any"
    """``any``: the first axis is the row; ``one``: it must be 1; ``none``: a request is one row
    without such an axis."""
    invariant_from: int | None = 1
    """Smallest batch from which a row's bits do not depend on its company; None: no size is invariant."""
    multiple_of: int = 1
    """Batches are padded to a multiple of this: kernels that take numbers in packets treat the rest apart."""
    spread: float = 0.0
    """Largest absolute difference seen between batches, where no size is invariant."""
    one_thread: bool = False
    """Whether the bits depend on the number of threads, so that one must be used."""
    max_rows: int = 4096
    """Most rows in one request."""


class Step(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One part of the model: steps run in order, each on the tensors of the one before."""

    kind: Literal["onnx", "python", "pickle"]
    path: str
    """File (or package folder) inside the bundle."""
    entry: str = ""
    """``module:function`` of a Python step."""


class Parity(Struct, frozen=True, forbid_unknown_fields=True):
    """How source and bundle were compared when packing."""

    framework: str
    framework_version: str
    example_rows: int
    threshold_rows: int
    exact: bool
    max_abs_diff: float
    ties: int = 0
    """Rows (of those compared) whose label differs, but by a tie that rounding decides in the source too."""
    left_out: int = 0
    """Rows that the source itself refuses, so that there was nothing to compare."""


class Contract(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything a caller, a server and an on-call person need to know of a model."""

    name: Name
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    purpose: str
    owner: str
    key: Key = Key()
    tolerance: Tolerance = Tolerance()
    batch: Batch = Batch()
    parity: Parity | None = None
    default: dict[str, Any] | None = None
    """Answer of static mode for an unknown key, one JSON value per output; None: 404."""
    deadline_ms: float | None = None
    """Time within which callers need the answer, where the model's owner knows it."""
    freshness_s: float | None = None
    """Age at which a baked prediction must no longer be used; None: as long as the bundle is served."""
    training_data: str = ""
    """What the model was trained on: a path, a query, a snapshot."""
    run: str = ""
    """Which run trained it: an id of an experiment tracker, a commit, a link."""
    format: int = 1
    """Of contracts by themselves; the manifest says that of the bundle."""

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    @property
    def own_code(self) -> bool:
        """Whether the bundle carries Python code (source or pickle) besides ONNX graphs."""
        return any(step.kind != "onnx" for step in self.steps)


class Library(Struct, frozen=True, forbid_unknown_fields=True):
    """One installed distribution."""

    name: str
    version: str


class Environment(Struct, frozen=True, forbid_unknown_fields=True):
    """The environment lock: where the bundle was packed."""

    python: str
    implementation: str
    system: str
    machine: str
    libraries: tuple[Library, ...]
    required: tuple[str, ...] = ()
    """Libraries whose versions must be the same wherever the bundle runs."""
    os: str = ""
    """Distribution and version, as ``debian 12``; "" where that is not known, as of bundles from before it was kept."""
    cpu: str = ""
    """Model of the processor."""
    gpus: tuple[str, ...] = ()
    """Models of the graphics processors that the driver shows."""


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a bundle."""

    path: str
    bytes: int
    sha256: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The files of a bundle; ``digest`` covers them all, ``created`` is not part of it."""

    format: int
    digest: str
    created: str
    files: tuple[FileEntry, ...]
