"""`parbake history` as a person runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from parbake.release.database import open_database
from parbake.release.model import Proposal, VerdictRecord, WaiverRecord
from tests.conftest import Parbake

DIGEST = "sha256:9b74c9897bac770ffc029102a200c5de"


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A working directory in which a release went wrong."""
    state = open_database(f"sqlite:///{tmp_path / '.parbake' / 'state.db'}")
    state.record_waiver(
        WaiverRecord("eta", "4", "environment", "bob", "same wheels, built here", {"digest": DIGEST})
    )
    refused = {"bundle_digest": DIGEST, "checks": {"schema": "breaks callers", "memory": "too much"}}
    state.record_change("release.refused", "eta", version="4", by="ana", why="at last", details=refused)
    begun = state.begin_release(
        Proposal("eta", "4", "sha256:41c2", kind="canary", steps=(0.01, 1.0)),
        by="ana",
        why="fewer late orders",
    )
    running = state.advance(begun, 0, by="controller")
    state.record_verdict(running, VerdictRecord("roll_back", "5.1 % fail, not 0.1 %"), by="judge")
    state.finish(running, "rolled_back", by="controller", why="5.1 % fail, not 0.1 %")
    state.set_parameters("price", {"threshold": 0.5}, after=0, by="ana")
    state.close()
    return tmp_path


def test_the_history_of_a_deployment_reads_from_top_to_bottom(parbake: Parbake, released: Path) -> None:
    done = parbake("history", "eta")
    assert (done.returncode, done.stderr) == (0, "")
    titles, *lines = done.stdout.splitlines()
    assert titles.split("   ")[0] == "when (UTC)"
    assert [re.split(" {3,}", line)[1:] for line in lines] == [
        ["eta@4", "9b74c9897bac", "waived environment", "bob", "same wheels, built here"],
        ["eta@4", "9b74c9897bac", "refused: schema, memory", "ana", "at last"],
        ["eta@4", "41c2", "begun (canary)", "ana", "fewer late orders"],
        ["eta@4", "41c2", "step 1: 1 % of the traffic", "controller"],
        ["eta@4", "41c2", "verdict: roll back", "judge", "5.1 % fail, not 0.1 %"],
        ["eta@4", "41c2", "rolled back", "controller", "5.1 % fail, not 0.1 %"],
    ]


def test_scripts_get_json_and_choose_what_they_see(parbake: Parbake, released: Path) -> None:
    events = json.loads(parbake("history", "--json").stdout)
    assert [event["what"] for event in events][-2:] == ["release.rolled_back", "parameters"]
    assert [event["digest"] for event in events[:3]] == [DIGEST, DIGEST, "sha256:41c2"]
    assert (events[-2]["digest"], events[-1]["digest"]) == ("sha256:41c2", "")
    assert events[2]["details"]["steps"] == [0.01, 1.0]
    assert len(json.loads(parbake("history", "eta", "--limit", "2", "--json").stdout)) == 2
    assert len(json.loads(parbake("history", "--since", "1h", "--json").stdout)) == len(events)
    for nothing in (("--since", "2999-01-01"), ("--since", "0s")):
        done = parbake("history", "eta", *nothing)
        assert (done.stdout, done.stderr) == ("", "nothing happened to eta since then\n")
    done = parbake("history", "--since", "yesterday")
    assert done.returncode == 2
    assert "'yesterday' is neither 90m, 2h, 7d nor a date" in done.stderr


def test_the_store_is_named_by_flag_variable_or_file(parbake: Parbake, released: Path) -> None:
    (released / ".parbake").rename(released / "kept")
    missing = parbake("history")
    assert missing.returncode == 3
    assert "error: no state at" in missing.stderr
    url = f"sqlite:///{released / 'kept' / 'state.db'}"
    assert "eta@4" in parbake("history", "--store", url).stdout
    assert "eta@4" in parbake("history", env={"PARBAKE_STORE": url}).stdout
    assert "eta@4" in parbake("history", "--state-dir", "kept").stdout
    (released / "parbake.toml").write_text('[server]\nstate_dir = "kept"\n')
    assert "eta@4" in parbake("history").stdout
    (released / "parbake.toml").write_text('[release]\nstore = "sqlite:///kept/state.db"\n')
    assert "eta@4" in parbake("history").stdout
