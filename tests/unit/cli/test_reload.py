"""What `parbake reload` asks a server to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from parbake.app.supervisor import Change
from parbake.cli.reload import Served, changes_of
from parbake.contract.bundle import StoredBundle
from parbake.errors import SettingsError, TableMissing


def nobody_asks() -> Served:
    """For what must be decided without the server."""
    raise AssertionError("the server was asked")


def test_without_words_everything_is_read_again() -> None:
    assert changes_of([], [], nobody_asks) == []


def test_a_directory_is_a_bundle_and_another_word_a_name(tmp_path: Path) -> None:
    assert changes_of([str(tmp_path), "eta"], [], nobody_asks) == [
        Change(bundle=str(tmp_path)),
        Change(name="eta"),
    ]


def test_the_only_table_goes_to_the_only_target(doubler_bundle: StoredBundle) -> None:
    bundle = str(doubler_bundle.path)
    assert changes_of([bundle], ["d.table"], nobody_asks) == [Change(bundle=bundle, table="d.table")]
    assert changes_of(["eta"], ["d.table"], nobody_asks) == [Change(name="eta", table="d.table")]


def test_a_table_may_name_its_deployment() -> None:
    assert changes_of([], ["eta=a.table", "fare=b.table"], nobody_asks) == [
        Change(name="eta", table="a.table"),
        Change(name="fare", table="b.table"),
    ]


def test_a_table_that_is_not_there_is_refused_before_the_server_is_asked(tmp_path: Path) -> None:
    with pytest.raises(TableMissing, match="no prediction table at"):
        changes_of([], [str(tmp_path / "no.table")], nobody_asks)


def test_a_bundle_may_be_put_under_a_deployment_of_another_name(doubler_bundle: StoredBundle) -> None:
    bundle = str(doubler_bundle.path)
    assert changes_of([bundle], [], nobody_asks, "eta") == [Change("eta", bundle)]
    assert changes_of([bundle], ["d.table"], nobody_asks, "eta") == [Change("eta", bundle, "d.table")]


def test_a_name_without_one_bundle_is_refused(tmp_path: Path) -> None:
    for targets in ([], ["fare"], [str(tmp_path), str(tmp_path)]):
        with pytest.raises(SettingsError, match="--name eta takes one bundle") as caught:
            changes_of(targets, [], nobody_asks, "eta")
        assert caught.value.hint == "parbake reload BUNDLE --name eta"
