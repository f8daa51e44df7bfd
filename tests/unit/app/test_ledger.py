"""What has happened is written down some time, whoever writes at the same time and whatever cannot be written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parbake.app.ledger import Ledger, Owed
from parbake.app.state import STATE_FILE
from parbake.app.trial import Trial
from parbake.errors import MissingExtra
from parbake.release.database import Database, open_database
from parbake.release.judge import Decision, Verdict
from parbake.release.model import Proposal, Release
from parbake.settings import ServerSettings, Settings

WORSE = Verdict(Decision.ROLL_BACK, "it is worse", ())


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    state = open_database(f"sqlite:///{tmp_path / STATE_FILE}")
    yield state
    state.close()


def running(state: Database) -> Release:
    state.finish(state.begin_release(Proposal("eta", "1", "sha256:1"), by="ada"), "live", by="ada")
    steps = (0.1, 0.5, 1.0)
    begun = state.begin_release(Proposal("eta", "2", "sha256:2", kind="canary", steps=steps), by="ada")
    return state.advance(begun, 0, by="ada")


class Disturbed:
    """A store in which somebody else writes down what its judge knows whenever one is about to."""

    def __init__(self, state: Database, times: int) -> None:
        self._state = state
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def remember(self, release: Release, known: bytes) -> Release:
        if self._times:
            self._times -= 1
            self._state.remember(self._state.release(release.id), b"")
        return self._state.remember(release, known)


def test_an_end_is_written_down_once_although_a_judge_writes_at_the_same_time(state: Database) -> None:
    release = running(state)
    trial = Trial.of(release, "1")
    write: Any = trial.ended("parbake", "it is worse", WORSE)
    write(Disturbed(state, 3))
    assert state.release(release.id).state == "rolled_back"
    whats = [event.what for event in state.history("eta")]
    assert whats.count("verdict.roll_back") == whats.count("release.rolled_back") == 1
    # Whoever writes it again changes nothing.
    write(state)
    assert [event.what for event in state.history("eta")] == whats


def test_an_end_that_comes_behind_going_live_takes_it_back(state: Database) -> None:
    release = running(state)
    write = Trial.of(release, "1").ended("parbake", "it is worse", None)
    state.finish(release, "live", by="ada")
    write(state)
    live = state.live("eta")
    assert live is not None
    assert live.proposal.version == "1"


def test_what_cannot_be_written_does_not_stand_in_the_way_of_what_can(
    state: Database, tmp_path: Path
) -> None:
    release = running(state)

    def broken(state: object) -> None:
        raise RuntimeError("a bug")

    async def test() -> None:
        ledger = Ledger(Settings(server=ServerSettings(state_dir=str(tmp_path))))
        await ledger.note(Owed("eta", "something", broken))
        assert ledger.lost == {"eta": "RuntimeError('a bug')"}
        end = Trial.of(release, "1").ended("parbake", "it is worse", WORSE)
        await ledger.note(Owed("eta", "version 2 was rolled back", end))
        await ledger.close()
        assert not ledger.owes("eta")
        assert not ledger.lost

    asyncio.run(test())
    assert state.release(release.id).state == "rolled_back"


def test_a_store_that_cannot_be_made_is_not_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    async def test() -> None:
        ledger = Ledger(Settings(server=ServerSettings(state_dir=str(tmp_path / "file"))))
        await ledger.note(Owed("eta", "its route was changed", lambda state: None))
        assert not ledger.away_since
        assert not ledger.owes("eta")
        assert "cannot be opened" in ledger.lost.pop("eta")
        # Who cannot have a store lacks nothing.
        monkeypatch.setattr("parbake.app.ledger.open_state", missing)
        await ledger.note(Owed("eta", "its route was changed", lambda state: None))
        assert not ledger.owes("eta")
        assert not ledger.lost
        await ledger.close()

    def missing(*_: object, **__: object) -> None:
        raise MissingExtra("SQLAlchemy", "release")

    asyncio.run(test())


def test_a_verdict_is_about_one_step_only(state: Database) -> None:
    trial = Trial.of(running(state), "1")
    trial.verdict = Verdict(Decision.PROMOTE, "no sign of harm", ())
    after = state.advance(trial.release, 1, by="ada")
    trial.on_step(after, trial.judge.next_step())
    assert trial.release.step == 1
    said: Verdict | None = trial.verdict
    assert said is None
