"""What every store of releases promises, asked of each database for real."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import msgspec
import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from parbake.errors import (
    Conflict,
    InvalidInput,
    LeaseLost,
    NotFound,
    ParbakeError,
    SettingsError,
    StateTooNew,
    VersionNotFound,
)
from parbake.release.connect import address_of
from parbake.release.database import Database, open_database
from parbake.release.model import ImageRecord, Lease, Proposal, Release, VerdictRecord, WaiverRecord
from parbake.release.schema import METADATA, VERSION
from parbake.release.state import State
from tests.postgres import ROLE, Postgres


def wanted(version: str = "1", deployment: str = "eta", **more: object) -> Proposal:
    return msgspec.structs.replace(Proposal(deployment, version, f"sha256:{version}"), **more)


def put_live(state: State, version: str, deployment: str = "eta") -> Release:
    begun = state.begin_release(wanted(version, deployment), by="ana")
    return state.finish(state.advance(begun, 0, by="ana"), "live", by="ana")


def words(state: State, deployment: str = "eta") -> list[str]:
    return [f"{event.what} {event.version}".strip() for event in state.history(deployment)]


def other(url: str, code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process at work on the store."""
    start = "import sys\nfrom parbake.release.database import open_database\nfrom parbake.release.model import *\n"
    text = start + "state = open_database(sys.argv[1])\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", text, url, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_a_release_goes_live_step_by_step_and_its_history_says_so(state: Database) -> None:
    begun = state.begin_release(
        wanted("4", kind="canary", steps=(0.01, 0.25, 1.0), every_s=600.0, margins={"failures": 0.01}),
        by="ana",
        why="fewer late orders",
    )
    assert (begun.state, begun.step, begun.share) == ("pending", -1, 0.0)
    running = state.advance(begun, 0, by="judge", judge_state=b"\x00\xff seen")
    assert (running.state, running.share, running.judge_state) == ("running", 0.01, b"\x00\xff seen")
    running = state.advance(running, 1, by="judge", why="no worse after 4000 requests")
    live = state.finish(running, "live", by="judge")
    assert (live.state, live.share) == ("live", 1.0)
    assert state.live("eta") == live == state.release(begun.id)
    assert words(state) == ["release.begun 4", "release.advanced 4", "release.advanced 4", "release.live 4"]
    first, _, third, _ = state.history("eta")
    assert (first.by, first.why, first.release) == ("ana", "fewer late orders", begun.id)
    assert {event.digest for event in state.history("eta")} == {begun.proposal.bundle_digest} != {""}
    assert first.details["margins"] == {"failures": 0.01}
    assert (third.why, third.details["share"]) == ("no worse after 4000 requests", 0.25)


def test_what_is_changed_elsewhere_is_told_in_the_history(state: Database) -> None:
    state.record_change("alias", "eta", version="3", by="ana", why="better", details={"alias": "champion"})
    state.record_change("route", "eta", by="bob", details={"route": None, "revision": 2})
    first, second = state.history("eta")
    assert (first.what, first.version, first.by, first.why) == ("alias", "3", "ana", "better")
    assert (second.what, second.version, second.details) == ("route", "", {"route": None, "revision": 2})
    with pytest.raises(InvalidInput):
        state.record_change("route", "no name", by="bob", details={})


def test_servers_tell_each_other_what_versions_have_earned_while_a_release_is_under_way(
    state: Database,
) -> None:
    release = state.begin_release(wanted("2", kind="bandit", steps=(0.5,)), by="ana")
    elsewhere = state.begin_release(wanted("2", "phi", kind="bandit", steps=(0.5,)), by="ana")
    assert state.share_rewards(release, "one", {"1": (1.0, 2.0)}) == {}
    assert state.share_rewards(elsewhere, "other", {"1": (7.0, 7.0)}) == {}
    assert state.share_rewards(release, "other", {"1": (3.0, 4.0), "2": (5.0, 0.0)}) == {"1": (1.0, 2.0)}
    assert state.share_rewards(release, "one", {"1": (2.0, 2.0)}) == {"1": (3.0, 4.0), "2": (5.0, 0.0)}
    assert state.share_rewards(release, "third", {}) == {"1": (5.0, 6.0), "2": (5.0, 0.0)}
    written = words(state)
    assert state.release(release.id) == release
    state.finish(release, "aborted", by="ana")
    assert state.share_rewards(release, "third", {"1": (1.0, 0.0)}) == {}
    assert state.share_rewards(elsewhere, "third", {}) == {"1": (7.0, 7.0)}
    assert words(state) == [*written, "release.aborted 2"]


def test_a_second_release_of_a_deployment_is_refused_with_who_and_when(state: Database) -> None:
    begun = state.begin_release(wanted("4", kind="canary"), by="ana")
    with pytest.raises(
        Conflict, match=r"eta is being released already: version 4 \(canary\), by ana since 20"
    ):
        state.begin_release(wanted("5"), by="bob")
    assert words(state) == ["release.begun 4"]
    state.begin_release(wanted("5", "other"), by="bob")
    state.finish(begun, "refused", by="gate", why="goldens differ")
    assert state.begin_release(wanted("5"), by="bob").proposal.version == "5"


def test_a_value_is_good_for_one_write(state: Database) -> None:
    begun = state.begin_release(wanted(kind="canary", steps=(0.1, 1.0)), by="ana")
    state.advance(begun, 0, by="one")
    before = state.history()
    attempts: list[Callable[[], object]] = [
        lambda: state.advance(begun, 1, by="two"),
        lambda: state.finish(begun, "aborted", by="two"),
        lambda: state.remember(begun, b"x"),
        lambda: state.record_verdict(begun, VerdictRecord("hold", "too few"), by="two"),
    ]
    for attempt in attempts:
        with pytest.raises(
            Conflict, match="changed by somebody else: it is at revision 2, not 1, and running"
        ):
            attempt()
    assert state.history() == before
    assert state.release(begun.id).judge_state == b""


def test_what_has_ended_stays_ended(state: Database) -> None:
    live = put_live(state, "1")
    with pytest.raises(Conflict, match="has ended: it is live"):
        state.advance(live, 0, by="x")
    with pytest.raises(Conflict, match="has ended: it is live"):
        state.finish(live, "rolled_back", by="x")
    pending = state.begin_release(wanted("2"), by="x")
    with pytest.raises(Conflict, match=r"is pending and cannot end as rolled_back\nhint: it can end as live"):
        state.finish(pending, "rolled_back", by="x")


def test_a_release_that_goes_live_supersedes_the_one_before(state: Database) -> None:
    first, second = put_live(state, "1"), put_live(state, "2")
    assert state.release(first.id).state == "superseded"
    assert state.live("eta") == second
    assert words(state)[-2:] == ["release.superseded 1", "release.live 2"]


def test_a_rollback_goes_to_the_last_good_and_then_to_the_one_before(state: Database) -> None:
    for version in ("1", "2", "3"):
        put_live(state, version)
    good = state.last_good("eta")
    assert good is not None
    assert good.proposal.version == "2"
    assert state.roll_back("eta", by="ana", why="late orders").proposal.version == "2"
    assert [release.state for release in state.releases("eta")] == ["superseded", "live", "rolled_back"]
    assert state.roll_back("eta", by="ana").proposal.version == "1"
    with pytest.raises(Conflict, match="eta has no version to go back to"):
        state.roll_back("eta", by="ana")
    assert state.roll_back("eta", to="3", by="ana").proposal.version == "3"
    with pytest.raises(Conflict, match="version 3 of eta is live already"):
        state.roll_back("eta", to="3", by="ana")
    with pytest.raises(VersionNotFound, match="version 9 of eta was never live"):
        state.roll_back("eta", to="9", by="ana")


def test_a_rollback_in_the_middle_of_a_release_leaves_the_live_one(state: Database) -> None:
    live = put_live(state, "1")
    running = state.advance(state.begin_release(wanted("2"), by="ana"), 0, by="ana")
    assert state.last_good("eta") == live
    assert state.roll_back("eta", by="judge", why="p99 +40 %") == live
    assert state.release(running.id).state == "rolled_back"
    assert state.history("eta")[-1].why == "p99 +40 %"
    assert not state.releases(under_way=True)


def test_verdicts_and_what_the_judge_knows_are_kept(state: Database) -> None:
    running = state.advance(state.begin_release(wanted("2"), by="ana"), 0, by="ana")
    evidence = ({"metric": "failures", "champion": 0.001, "challenger": 0.05, "bound": math.inf},)
    kept = state.record_verdict(running, VerdictRecord("roll_back", "5 % fail", evidence), by="judge")
    assert (kept.release, kept.id > 0, kept.at > 0) == (running.id, True, True)
    [read] = state.verdicts(running)
    assert (read.action, read.reason, read.evidence[0]["challenger"]) == ("roll_back", "5 % fail", 0.05)
    assert words(state)[-1] == "verdict.roll_back 2"
    before = state.history()
    after = state.remember(running, b"\x01" * 100_000)
    assert state.release(running.id) == after
    assert after.judge_state == b"\x01" * 100_000
    assert state.history() == before


def test_facts_say_who_released_a_version_and_what_was_let_pass(state: Database) -> None:
    state.record_waiver(WaiverRecord("eta", "2", "environment", "bob", "same wheels", {"sklearn": "1.7"}))
    state.begin_release(
        wanted("2", image="registry/eta@sha256:1", table="blake2b:2"), by="ana", why="because"
    )
    facts = state.facts("eta", "2")
    assert facts is not None
    assert (facts.released_by, facts.image, facts.table) == ("ana", "registry/eta@sha256:1", "blake2b:2")
    assert (facts.state, facts.why, facts.bundle_digest) == ("pending", "because", "sha256:2")
    [waiver] = facts.waivers
    assert (waiver.check, waiver.by, waiver.why, waiver.evidence) == (
        "environment", "bob", "same wheels", {"sklearn": "1.7"},
    )  # fmt: skip
    assert state.waivers("eta") == [waiver]
    assert state.facts("eta", "3") is None
    assert words(state)[0] == "waiver 2"


def test_parameters_are_changed_live_and_every_version_is_kept(state: Database) -> None:
    assert state.parameters("eta").version == 0
    state.set_parameters("eta", {"threshold": 0.5}, after=0, by="ana")
    state.set_parameters("eta", {"threshold": 0.6, "kill": True}, after=1, by="bob", why="fraud wave")
    with pytest.raises(Conflict, match="are at version 2, not 1: bob changed them"):
        state.set_parameters("eta", {}, after=1, by="ana")
    assert state.parameters("eta").values == {"threshold": 0.6, "kill": True}
    assert state.parameters("eta", 1).values == {"threshold": 0.5}
    with pytest.raises(NotFound, match="have no version 7"):
        state.parameters("eta", 7)
    assert state.history("eta")[-1].details["before"] == {"threshold": 0.5}


def test_settings_of_a_deployment_have_revisions(state: Database) -> None:
    made = state.configure("eta", {"mode": "hybrid"}, revision=0, by="ana")
    assert (made.revision, made.settings, made.by) == (1, {"mode": "hybrid"}, "ana")
    with pytest.raises(Conflict, match="at revision 1, not 0"):
        state.configure("eta", {}, revision=0, by="bob")
    state.begin_release(wanted("1", "Zeta"), by="ana")
    assert state.configure("Zeta", {"a": 1}, revision=0, by="ana").revision == 1
    assert [deployment.name for deployment in state.deployments()] == ["Zeta", "eta"]


def test_the_history_is_read_from_a_time_on_and_the_newest_first_to_be_kept(state: Database) -> None:
    put_live(state, "1")
    middle = state.history()[1].at
    time.sleep(0.01)
    put_live(state, "1", "other")
    everything = state.history()
    assert [event.id for event in everything] == sorted(event.id for event in everything)
    assert len(everything) == 6
    assert state.history(limit=2) == everything[-2:]
    assert state.history("eta", since=middle) == [e for e in everything[:3] if e.at >= middle]
    assert state.history(limit=0) == []


@pytest.mark.parametrize("table", ["history", "verdicts", "waivers", "parameters"])
def test_nobody_changes_what_was_written(url: str, state: Database, table: str) -> None:
    running = state.advance(state.begin_release(wanted(), by="ana"), 0, by="ana")
    state.record_verdict(running, VerdictRecord("hold", "too few"), by="judge")
    state.record_waiver(WaiverRecord("eta", "1", "owner", "ana", "soon"))
    state.set_parameters("eta", {}, after=0, by="ana")
    changes = ["UPDATE {0} SET {1} = {1}", "DELETE FROM {0}"]
    if url.startswith("sqlite"):
        changes += ["INSERT OR REPLACE INTO {0} SELECT * FROM {0}", "UPDATE OR IGNORE {0} SET {1} = 7"]
    else:
        key = "deployment, version" if table == "parameters" else "id"
        changes += ["TRUNCATE {0}", "TRUNCATE {0} CASCADE"]
        changes += [f"INSERT INTO {{0}} SELECT * FROM {{0}} ON CONFLICT ({key}) DO UPDATE SET {{1}} = 7"]
    # A connection of somebody else's, without what ours sets up.
    engine = sa.create_engine(address_of(url))
    try:
        with engine.connect() as connection:
            count = f"SELECT count(*) FROM {table}"
            before = connection.exec_driver_sql(count).scalar_one()
            assert before >= 1
            for change in changes:
                connection.rollback()
                with pytest.raises(exc.DBAPIError, match=f"{table} is append-only"):
                    connection.exec_driver_sql(
                        change.format(table, "version" if table == "parameters" else "id")
                    )
            connection.rollback()
            assert connection.exec_driver_sql(count).scalar_one() == before
    finally:
        engine.dispose()


def test_a_lease_is_one_holders_until_it_is_over(state: Database) -> None:
    first = state.lease("controller", "one", 3)
    assert first is not None
    assert state.lease("controller", "two", 60) is None
    assert state.lease("else", "two", 60) is not None
    renewed = state.lease("controller", "one", 3)
    assert renewed is not None
    assert (renewed.token, renewed.until > first.until) == (first.token, True)
    time.sleep(3.1)
    second = state.lease("controller", "two", 60)
    assert second is not None
    assert second.token == first.token + 1
    assert state.lease("controller", "one", 60) is None


def test_whoever_lost_the_lease_writes_nothing(state: Database) -> None:
    old = state.lease("controller", "one", 60)
    assert old is not None
    begun = state.begin_release(wanted(steps=(0.1, 1.0)), by="one", fence=old)
    running = state.advance(begun, 0, by="one", fence=old)
    state.give_up(old)
    new = state.lease("controller", "two", 60)
    before = state.history()
    attempts: list[Callable[[], object]] = [
        lambda: state.advance(running, 1, by="one", fence=old),
        lambda: state.finish(running, "live", by="one", fence=old),
        lambda: state.remember(running, b"x", fence=old),
        lambda: state.record_verdict(running, VerdictRecord("hold", ""), by="one", fence=old),
        lambda: state.roll_back("eta", by="one", fence=old),
        lambda: state.begin_release(wanted("2", "other"), by="one", fence=old),
    ]
    for attempt in attempts:
        with pytest.raises(LeaseLost, match="one has lost the lease controller: two has it"):
            attempt()
    assert state.history() == before
    assert state.deployments()[0].name == "eta"
    assert state.advance(running, 1, by="two", fence=new).step == 1
    with pytest.raises(LeaseLost):
        state.remember(running, b"x", fence=Lease("never", "two", 1, 0.0))


def test_a_lease_that_is_given_up_goes_to_others_at_once(state: Database) -> None:
    first = state.lease("controller", "one", 60)
    assert first is not None
    state.give_up(first)
    second = state.lease("controller", "two", 60)
    assert second is not None
    state.give_up(first)
    assert state.lease("controller", "one", 60) is None
    assert words(state, "") == ["lease.taken", "lease.given_up", "lease.taken"]


def test_of_many_that_begin_at_once_one_does(url: str, state: Database) -> None:
    code = """
        from parbake.errors import Conflict
        print("ready", flush=True)
        sys.stdin.read()
        try:
            state.begin_release(Proposal("eta", sys.argv[2], "d"), by=sys.argv[2])
            print("begun")
        except Conflict as error:
            print("refused", error)
    """
    start = "import sys\nfrom parbake.release.database import open_database\nfrom parbake.release.model import *\n"
    text = start + "state = open_database(sys.argv[1])\n" + textwrap.dedent(code)
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", text, url, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.close()
        rival.stdin = None
    said = [rival.communicate(timeout=60)[0] for rival in rivals]
    assert sorted(text.split()[0] for text in said) == ["begun", "refused", "refused", "refused"]
    assert len(state.releases()) == len(state.history()) == 1


def test_two_controllers_at_once_never_both_take_a_step(state: Database) -> None:
    steps = tuple((number + 1) / 40 for number in range(40))
    begun = state.begin_release(wanted(kind="canary", steps=steps), by="ana")
    taken: list[int] = []
    lock = threading.Lock()

    def control(holder: str) -> None:
        while True:
            now = state.release(begun.id)
            if now.step == 39:
                return
            try:
                state.advance(now, now.step + 1, by=holder)
            except Conflict:
                continue
            with lock:
                taken.append(now.step + 1)

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(control, f"c{number}") for number in range(3)]:
            done.result(timeout=60)
    assert sorted(taken) == list(range(40))
    advanced = [event.details["step"] for event in state.history("eta") if event.what == "release.advanced"]
    assert advanced == list(range(40))


def test_processes_that_open_an_empty_store_at_once_all_find_it_ready(url: str) -> None:
    code = "state.set_parameters(sys.argv[2], {}, after=0, by='x'); print('done')"
    openers = [other(url, code, f"d{number}") for number in range(4)]
    assert [opener.communicate(timeout=60)[0] for opener in openers] == ["done\n"] * 4
    state = open_database(url)
    assert len(state.history()) == 4
    state.close()


def test_a_store_that_a_newer_parbake_changed_is_refused(url: str, state: Database) -> None:
    put_live(state, "1")
    engine = sa.create_engine(address_of(url))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE schema_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(StateTooNew, match=rf"has schema 9999, and this parbake knows {VERSION} at most"):
        open_database(url)


def test_a_store_from_before_images_and_rewards_is_brought_up_with_all_that_it_has(
    url: str, state: Database
) -> None:
    live = put_live(state, "1")
    before = state.history()
    engine = sa.create_engine(address_of(url))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE images")
        connection.exec_driver_sql("DROP TABLE rewards")
        connection.exec_driver_sql("UPDATE schema_version SET version_num = '0001'")
    engine.dispose()
    with closing(open_database(url)) as again:
        assert (again.live("eta"), again.history(), again.images()) == (live, before, [])
        again.record_image(
            ImageRecord("eta:1", "sha256:a", live.proposal.bundle_digest, "eta", "1", by="ana")
        )
        facts = again.facts("eta", "1")
        assert again.share_rewards(again.begin_release(wanted("2"), by="ana"), "one", {"1": (1.0, 0.0)}) == {}
    assert facts is not None
    assert facts.image == "eta:1 sha256:a"


def test_the_migrations_make_the_tables_that_the_code_uses(url: str, state: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = sa.create_engine(address_of(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "schema_version"})
        assert context.get_current_revision() == VERSION
        assert compare_metadata(context, METADATA) == []
    engine.dispose()


def test_a_store_opened_again_has_everything(url: str, state: Database) -> None:
    put_live(state, "1")
    before = state.history(), state.releases(), state.deployments()
    state.close()
    again = open_database(url)
    assert (again.history(), again.releases(), again.deployments()) == before
    again.close()


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda s: s.begin_release(wanted("../1"), by="a"), "'../1' cannot be a name at version"),
        (lambda s: s.begin_release(wanted("1", "a b"), by="a"), "'a b' cannot be a name at deployment"),
        (lambda s: s.begin_release(wanted(steps=()), by="a"), "one step at least at steps"),
        (lambda s: s.begin_release(wanted(steps=(0.1, 25)), by="a"), r"25 is no share .* at steps\[1\]"),
        (lambda s: s.begin_release(wanted(steps=(math.nan,)), by="a"), "nan is no share"),
        (lambda s: s.begin_release(wanted(every_s=-1), by="a"), "-1 is no time"),
        (lambda s: s.begin_release(wanted(), by="a\0"), "no text at by"),
        (lambda s: s.begin_release(wanted(), by="a", why="\ud800"), "no text at why"),
        (lambda s: s.begin_release(wanted(), by="a", why="x" * 20_000), "20000 characters are more"),
        (lambda s: s.begin_release(wanted(margins={"a": object()}), by="a"), "cannot be kept as JSON"),
        (
            lambda s: s.set_parameters("eta", {"a": "x" * 5_000_000}, after=0, by="a"),
            "bytes of JSON are more",
        ),
        (lambda s: s.set_parameters("eta", {"a": "\0\ud800"}, after=0, by="a"), "cannot be kept as JSON"),
        (lambda s: s.lease("c", "one", 0), "between 0 seconds and a day"),
        (lambda s: s.lease("c", "one", math.nan), "between 0 seconds and a day"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    state: Database, attempt: Callable[[State], object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        attempt(state)
    assert state.history() == []
    assert state.deployments() == []


def test_words_in_any_language_come_back_as_they_were(state: Database) -> None:
    why = "größer: 漢字 'quoted' \"; DROP TABLE history; -- \u200b\n🙂"
    state.set_parameters("eta", {"ключ": [why, "\0", 1e308, 2**53]}, after=0, by="Зоя", why=why)
    event = state.history()[-1]
    assert (event.by, event.why) == ("Зоя", why)
    assert state.parameters("eta").values == {"ключ": [why, "\0", 1e308, 2**53]}


@pytest.mark.parametrize("number", [0, -1, 7, 2**63, 2**80])
def test_a_release_that_never_was_is_not_found(state: Database, number: int) -> None:
    with pytest.raises(NotFound, match="no release"):
        state.release(number)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "is no URL"),
        ("nonsense", "is no URL"),
        ("sqlite://", "no path of a file"),
        ("sqlite:///:memory:", "no path of a file"),
        ("sqlite://host/state.db", "no path of a file"),
        ("sqlite:///state.db?mode=ro", "cannot have a question mark"),
        ("mysql://root@host/db", "a store cannot be mysql"),
    ],
)
def test_a_store_that_is_none_is_refused(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        open_database(url)
    assert "postgresql://" in caught.value.hint


def test_a_database_that_cannot_keep_every_text_is_refused(postgres: Postgres) -> None:
    postgres.sql("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(SettingsError, match="keeps text as LATIN1"):
        open_database(f"postgresql://{ROLE}@/latin?host={postgres.folder}")


def test_an_error_never_shows_the_password() -> None:
    with pytest.raises(ParbakeError) as caught:
        open_database("postgresql://ana:hunter2@127.0.0.1:1/db")
    assert "does not answer" in str(caught.value)
    assert "hunter2" not in str(caught.value)
