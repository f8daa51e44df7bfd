"""What a prediction table is beside its data: where it came from and what its file must be."""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import msgspec
from msgspec import Struct

from parbake.contract.datatypes import Datatype
from parbake.contract.model import Contract

FORMAT: Final = 1
"""Format of tables that this version writes, and the newest it reads."""

LINEAGE: Final = "lineage.json"
DATA: Final = "data.mdb"


class RecordOutput(Struct, frozen=True, forbid_unknown_fields=True):
    """One output as a record holds it: ``shape`` is that of one row."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...] = ()


class RecordLayout(Struct, frozen=True, forbid_unknown_fields=True):
    """How `parbake.contract.record` laid the records out."""

    kind: Literal["fixed", "sized"]
    """``fixed``: every record has ``bytes`` bytes; ``sized``: outputs stand behind their sizes."""
    bytes: int | None
    outputs: tuple[RecordOutput, ...]


class Lineage(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a table came from, what it holds, and what its data file must be."""

    bundle_digest: str
    contract: str
    """Name of the contract that was baked."""
    input: str
    """Name of the file of rows; ``-`` is the standard input."""
    input_format: str
    input_digest: str
    """``blake2b:...`` of the file of rows, 256 bits: ``b2sum -l 256`` gives the same."""
    input_bytes: int
    rows: int
    """Rows of the input that were baked."""
    keys: int
    """Entries of the table: rows less duplicates."""
    duplicates: int
    skipped: int
    """Rows of the input that were left out because they did not fit the contract."""
    created: str
    record: RecordLayout
    data_bytes: int
    data_digest: str
    """``blake2b:...`` of the data file."""
    digest: str = ""
    """SHA-256 over everything else in here, so that an edited lineage is noticed."""
    format: int = FORMAT


def layout_of(contract: Contract) -> RecordLayout:
    """The layout of the records of a contract."""
    sizes = [spec.row_bytes for spec in contract.outputs]
    known = [size for size in sizes if size is not None]
    fixed = len(known) == len(sizes)
    return RecordLayout(
        "fixed" if fixed else "sized",
        sum(known) if fixed else None,
        tuple(RecordOutput(spec.name, spec.datatype, spec.shape) for spec in contract.outputs),
    )


def sealed(lineage: Lineage) -> Lineage:
    """The lineage with its digest filled in."""
    return msgspec.structs.replace(lineage, digest=_digest(lineage))


def is_sealed(lineage: Lineage) -> bool:
    """Whether the digest fits the rest."""
    return lineage.digest == _digest(lineage)


def _digest(lineage: Lineage) -> str:
    bare = msgspec.structs.replace(lineage, digest="")
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()
