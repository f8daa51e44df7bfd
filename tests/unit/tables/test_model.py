"""The lineage of a table notices when it is edited."""

from __future__ import annotations

import msgspec

from parbake.contract.model import Contract, TensorSpec
from parbake.tables.model import Lineage, is_sealed, layout_of, sealed

OUTPUTS = (TensorSpec("label", "INT64", ()), TensorSpec("p", "FP32", (3,)))


def _contract(*outputs: TensorSpec) -> Contract:
    return Contract("c", (TensorSpec("x", "FP32", (2,)),), outputs, (), "p", "o")


def _lineage() -> Lineage:
    return Lineage(
        "sha256:a", "c", "in.csv", "csv", "sha256:b", 10, 2, 2, 0, 0, "2026-01-01T00:00:00+00:00",
        layout_of(_contract(*OUTPUTS)), 4096, "00",
    )  # fmt: skip


def test_a_sealed_lineage_survives_the_file_and_an_edited_one_does_not() -> None:
    lineage = sealed(_lineage())
    again = msgspec.json.decode(msgspec.json.encode(lineage), type=Lineage)
    assert is_sealed(again)
    assert not is_sealed(_lineage())
    for change in ({"bundle_digest": "sha256:x"}, {"keys": 3}, {"data_digest": "11"}):
        assert not is_sealed(msgspec.structs.replace(lineage, **change))


def test_the_layout_says_how_large_a_record_is() -> None:
    fixed = layout_of(_contract(*OUTPUTS))
    assert (fixed.kind, fixed.bytes) == ("fixed", 8 + 12)
    sized = layout_of(_contract(*OUTPUTS, TensorSpec("why", "BYTES", (1,))))
    assert (sized.kind, sized.bytes) == ("sized", None)
    assert [output.name for output in sized.outputs] == ["label", "p", "why"]
