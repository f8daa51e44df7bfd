"""Items, what the store of releases adds to them, and what is known of their libraries."""

from __future__ import annotations

from datetime import date

import pytest
from msgspec.structs import replace

from parbake.contract.bundle import StoredBundle
from parbake.contract.model import Library
from parbake.release import lifetimes
from parbake.release.advisories import Advisories, Looked, nothing_known
from parbake.release.gate import Waiver
from parbake.release.inventory import (
    Item,
    Machine,
    ReleaseFact,
    environment_of,
    item_of,
    judged,
    machine_of,
    with_facts,
)

TODAY = date(2026, 11, 21)


def test_an_item_says_all_that_the_bundle_says(doubler_bundle: StoredBundle) -> None:
    item = item_of(doubler_bundle, version="3", where="somewhere")
    assert (item.name, item.version, item.state, item.owner) == (
        "doubler",
        "3",
        "stored",
        "tests@parbake.example",
    )
    assert item.digest == doubler_bundle.digest
    assert item.inputs[0].unit == "m"
    assert (item.format, item.made_by) == ("onnx", "onnx 1.0")
    assert item.machine == item.packed_on
    assert item.machine.libraries == doubler_bundle.environment.libraries
    assert item.machine.os == doubler_bundle.environment.os != ""
    assert item.machine.runtime.startswith("onnxruntime ")


def test_a_machine_is_an_environment_again(doubler_bundle: StoredBundle) -> None:
    lock = doubler_bundle.environment
    assert environment_of(machine_of(lock)) == replace(lock, required=())


def test_releases_are_found_by_version_or_by_digest(doubler_bundle: StoredBundle) -> None:
    waiver = Waiver("memory", "me", "once", "2026-01-31T00:00:00+00:00")
    fact = ReleaseFact(
        "doubler",
        "3",
        doubler_bundle.digest,
        "live",
        aliases=("champion",),
        released_by="me",
        waivers=(waiver,),
    )
    stored, running, other = (
        item_of(doubler_bundle),
        item_of(doubler_bundle, version="3", state="running"),
        item_of(doubler_bundle, version="4", state="running"),
    )
    one, two, three = with_facts([stored, running, other], [fact])
    assert (one.state, one.version, one.release, one.aliases) == ("released", "3", "live", ("champion",))
    assert (two.state, two.released_by, two.waivers) == ("running", "me", (waiver,))
    assert three == other


def test_a_release_whose_bundle_is_gone_is_told_all_the_same() -> None:
    (item,) = with_facts([], [ReleaseFact("eta", "1", "sha256:1", "rolled_back", "models:/eta/1")])
    assert (item.name, item.version, item.state, item.release) == ("eta", "1", "released", "rolled_back")
    assert item.problem == "its bundle was not found here"


def test_what_was_waived_before_any_release_is_found(doubler_bundle: StoredBundle) -> None:
    waiver = Waiver("memory", "me", "once", "2026-01-31T00:00:00+00:00")
    (item,) = with_facts(
        [item_of(doubler_bundle)], [ReleaseFact("doubler", "2", doubler_bundle.digest, waivers=(waiver,))]
    )
    assert (item.state, item.version, item.waivers) == ("stored", "2", (waiver,))


def test_where_nobody_answers_vulnerabilities_are_unknown_and_not_none() -> None:
    item = Item(
        "eta",
        "1",
        "running",
        "",
        "",
        machine=Machine(python="CPython 3.11.7", libraries=(Library("a", "1"),)),
    )
    assert judged(item, nothing_known("no network"), TODAY).vulnerable is None
    asked = Advisories(Looked("url", "", True), answers={("b", "1"): ()})
    found = judged(item, asked, TODAY)
    assert (found.vulnerable, found.not_judged) == ((), ("a",))


@pytest.mark.parametrize(
    ("python", "os", "ends"),
    [
        ("CPython 3.11.7", "debian 12", [("2027-10-31", False), ("2028-06-30", False)]),
        ("CPython 3.9.1", "debian 11", [("2025-10-31", True), ("2026-08-31", True)]),
        ("CPython 4.0.0", "plan9 4", [("unknown", None), ("unknown", None)]),
        ("", "", [("unknown", None), ("unknown", None)]),
    ],
)
def test_lifetimes_are_told_and_unknown_where_nobody_wrote_them_down(
    python: str, os: str, ends: list[tuple[str, bool | None]]
) -> None:
    item = Item("eta", "1", "running", "", "", machine=Machine(os=os, python=python))
    found = judged(item, nothing_known("nobody was asked"), TODAY)
    assert [(one.ends, one.ended) for one in found.lifetimes] == ends


def test_every_day_in_the_table_is_one() -> None:
    for version in ("3.8", "3.11", "3.14"):
        assert date.fromisoformat(lifetimes.end_of_python(version)).year >= 2024
    assert date.fromisoformat(lifetimes.AS_OF) <= date(2100, 1, 1)
    assert lifetimes.ended("2026-11-21", TODAY) is False
    assert lifetimes.ended("2026-11-20", TODAY) is True


def test_a_damaged_bundle_is_judged_by_nothing() -> None:
    item = Item("eta", "", "damaged", "", "x", problem="torn")
    assert judged(item, nothing_known(""), TODAY) == replace(item)
