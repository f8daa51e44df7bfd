"""The checks of the gate as values: what passes, what fails, what is not known, and what can be waived."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import Contract, Step, TensorSpec
from parbake.errors import SettingsError
from parbake.release import gate
from parbake.release.gate import CHECKS, Baked, Check, Measured, Outcome, Replayed, Waiver, make_waiver

CONTRACT = Contract(
    "eta",
    (TensorSpec("x", "FP32"),),
    (TensorSpec("y", "FP32"),),
    (Step("onnx", "m.onnx"),),
    "to plan",
    "team",
)
OUTCOMES: tuple[Outcome, ...] = ("passed", "failed", "unknown")
FOUND = st.dictionaries(st.sampled_from(CHECKS), st.sampled_from(OUTCOMES), min_size=1)
WAIVED = st.sets(st.sampled_from([name for name in CHECKS if name != "digest"]))


def waiver(check: str) -> Waiver:
    return make_waiver(check, "me", "just once", datetime(2026, 1, 31, tzinfo=UTC))


@given(FOUND, WAIVED)
def test_only_what_passed_or_was_waived_by_its_name_goes_through(
    found: dict[str, Outcome], waived: set[str]
) -> None:
    checks = [Check(name, verdict, "words") for name, verdict in found.items()]
    report = gate.report("b", CONTRACT, "sha256:1", "", checks, [waiver(name) for name in waived])
    assert report.ok == all(verdict == "passed" or name in waived for name, verdict in found.items())
    assert [check.name for check in report.checks] == sorted(found, key=CHECKS.index)
    # A waiver for a check that passed was not needed, and is not written down.
    assert {one.check for one in report.waivers} == {n for n in waived if found.get(n, "passed") != "passed"}


def test_a_waiver_has_a_check_a_name_and_a_reason() -> None:
    assert waiver("goldens") == Waiver("goldens", "me", "just once", "2026-01-31T00:00:00+00:00")
    with pytest.raises(SettingsError, match="no check 'golden' to waive") as refused:
        make_waiver("golden", "me", "because")
    assert refused.value.hint == f"checks are {', '.join(CHECKS)}"
    with pytest.raises(SettingsError, match="the waiver of goldens has no reason"):
        make_waiver("goldens", "me", "  ")
    with pytest.raises(SettingsError, match="has no name under it"):
        make_waiver("goldens", "", "because")
    with pytest.raises(SettingsError, match="the digest cannot be waived"):
        make_waiver("digest", "me", "because")


def test_latency_and_memory_are_held_against_limits_only_where_there_are_some() -> None:
    found = Measured(300, 1.0, 4.0, 50_000_000)
    assert gate.latency_check(found, 5.0).verdict == "passed"
    assert gate.latency_check(found, 3.9).verdict == "failed"
    assert gate.latency_check(found, None).words == "p99 4 ms for one row, limit no limit"
    assert gate.memory_check(found, 50_000_000).verdict == "passed"
    assert gate.memory_check(found, 49_999_999).verdict == "failed"
    assert gate.latency_check(None, 5.0).verdict == gate.memory_check(None, None).verdict == "unknown"


def test_goldens_must_be_there_and_answered() -> None:
    assert (
        gate.golden_check(Replayed(4, 0, 0.0, 0.0, 0.0)).words
        == "4 rows answered exactly, largest difference 0"
    )
    assert gate.golden_check(Replayed(4, 1, 0.5, 0.0, 0.0)).verdict == "failed"
    assert gate.golden_check(Replayed(0, 0, 0.0, 0.0, 0.0)).verdict == "failed"
    assert gate.golden_check(None).verdict == "unknown"
    assert gate.golden_check(None, "it raised").verdict == "failed"


def test_a_table_must_be_baked_by_the_bundle_and_hold_something() -> None:
    assert gate.table_check("sha256:1", None).verdict == "passed"
    assert gate.table_check("sha256:1", None, needed=True).verdict == "failed"
    assert gate.table_check("sha256:1", Baked("t", 3, "sha256:1")).verdict == "passed"
    assert gate.table_check("sha256:1", Baked("t", 0, "sha256:1")).words == "the table is empty"
    assert gate.table_check("sha256:1", Baked("t", 3, "sha256:2")).verdict == "failed"
    assert gate.table_check("sha256:1", Baked("t", 0, "", "it is torn")).words == "it is torn"


@pytest.mark.parametrize(
    ("purpose", "owner", "words"), [("", "o", "no purpose"), (" ", "", "no purpose and no owner")]
)
def test_nobody_answers_for_a_model_without_owner_or_purpose(purpose: str, owner: str, words: str) -> None:
    contract = Contract("eta", CONTRACT.inputs, CONTRACT.outputs, CONTRACT.steps, purpose, owner)
    found = gate.metadata_check(contract)
    assert (found.verdict, found.words) == ("failed", words)
