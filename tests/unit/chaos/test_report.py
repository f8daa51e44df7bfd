"""The chaos suite's figures: what counts as an outage, what as held, and how it is written down."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from bench.machine import Machine
from chaos.load import BROKEN, REFUSED, SILENT, Heard, Noted
from chaos.model import (
    Check,
    Finding,
    NotTested,
    Observed,
    Scenario,
    Stage,
    at_least,
    at_most,
    finding,
    no_failures,
    none,
)
from chaos.report import Report, keep, page, show, verdict

MACHINE = Machine("a processor", 2, 4.0, "Linux", "CPython 3.12", {"parbake": "0.1.0"}, "2026-01-01")


def noted(ended: float, status: int = 200, code: str = "", began: float | None = None) -> Noted:
    return Noted(ended - 0.1 if began is None else began, ended, status, code, 0)


def heard(*all_noted: Noted, began: float = 0.0, ended: float = 10.0) -> Heard:
    return Heard("callers", all_noted, "", began, ended)


def scenario(name: str = "fault") -> Scenario:
    def play(stage: Stage) -> Observed:
        raise NotTested("no")

    return Scenario(name, "something is broken", "nobody notices", play)


def test_an_outage_is_the_longest_time_without_a_right_answer() -> None:
    assert heard(noted(1), noted(2), noted(5), noted(9)).outage_ms() == pytest.approx(4000)


def test_an_outage_that_has_not_ended_counts_until_the_end() -> None:
    assert heard(noted(1), noted(2)).outage_ms() == pytest.approx(8000)
    assert heard(noted(5), noted(9)).outage_ms() == pytest.approx(5000)
    assert heard().outage_ms() == pytest.approx(10_000)


def test_refusals_and_wrong_answers_do_not_end_an_outage() -> None:
    between = [noted(3), noted(4, 503, "runner_down"), noted(5, 200, "wrong"), noted(6, BROKEN), noted(9)]
    assert heard(*between).outage_ms() == pytest.approx(6000)


def test_failures_are_counted_by_what_callers_were_told() -> None:
    them = heard(
        noted(1),
        noted(2, 503, "runner_down"),
        noted(3, 503, "runner_down"),
        noted(4, BROKEN),
        noted(5, REFUSED),
        noted(6, SILENT),
        noted(7, 200, "wrong"),
    )
    assert them.reasons() == {
        "503 runner_down": 2,
        "connection broken": 1,
        "connection refused": 1,
        "no answer": 1,
    }
    assert [failed.status for failed in them.but("runner_down")] == [BROKEN, REFUSED, SILENT]
    assert them.wrong == 1
    assert len(them.good) == 1


def test_latencies_are_those_of_right_answers_in_order() -> None:
    them = heard(
        noted(2, began=1.5), noted(3, began=2.9), noted(4, 503, began=0.0), noted(5, 200, "wrong", 0.0)
    )
    assert them.latencies_ms() == pytest.approx([100, 500])


def test_a_promise_holds_at_its_limit_and_not_beyond_it() -> None:
    assert none("x", 0).held
    assert not none("x", 1).held
    assert at_most("x", 1000, 1000, "ms").held
    assert not at_most("x", 1000.1, 1000, "ms").held
    assert not at_most("x", float("inf"), 1000, "ms").held
    assert not at_most("x", float("nan"), 1000, "ms").held
    assert at_least("x", 0.9, 0.9).held
    assert not at_least("x", 0.89, 0.9).held
    assert not at_least("x", float("nan"), 0.9).held


@pytest.mark.parametrize(
    ("codes", "is_held", "about_time"),
    [
        ((), True, False),
        (("deadline_exceeded", "overloaded"), False, True),
        (("overloaded",) * 20, False, True),
        (("overloaded",) * 21, False, False),
        (("deadline_exceeded", "runner_down"), False, False),
        (("",), False, False),
    ],
)
def test_failures_are_about_time_where_they_are_few_and_only_deadlines_stood_in_the_way(
    codes: tuple[str, ...], is_held: bool, about_time: bool
) -> None:
    check = no_failures("x", [noted(1, 503, code) for code in codes])
    assert (check.held, check.nearly) == (is_held, about_time)
    assert check.got == len(codes)


def test_a_wrong_answer_breaks_a_promise_in_every_scenario() -> None:
    right = finding(scenario(), Observed([heard(noted(1), noted(9))], [], {}), 10)
    wrong = finding(scenario(), Observed([heard(noted(1), noted(5, 200, "wrong"), noted(9))], [], {}), 10)
    assert right.held
    assert not wrong.held
    assert (wrong.requests, wrong.wrong) == (3, 1)


def test_one_broken_promise_is_enough() -> None:
    seen = Observed([heard(noted(1))], [none("a", 0), none("b", 2)], {})
    assert not finding(scenario(), seen, 10).held


def test_the_page_tells_what_held_what_did_not_and_what_was_not_tested() -> None:
    them = heard(noted(1), noted(2, 503, "runner_down"), noted(9))
    report = Report(
        MACHINE,
        (
            finding(scenario("good"), Observed([them], [at_most("outage", 8000, 9000, "ms")], {"kills": 2}), 10),
            finding(scenario("bad"), Observed([them], [none("failed requests", 1)], {}), 10),
            Finding("away", "the moon is moved", "tides", 0.0, not_tested="it is too heavy"),
        ),
    )  # fmt: skip
    text = page(report)
    assert "6 requests in 2 scenarios, 0 wrong answers." in text
    assert "| [something is broken](#good) | nobody notices | 3 | 1 | 8,000 ms | held |" in text
    assert "| [something is broken](#bad) | nobody notices | 3 | 1 | 8,000 ms | **not held** |" in text
    assert "| [the moon is moved](#away) | tides |  |  |  | not tested here |" in text
    assert "Not tested here: it is too heavy." in text
    assert "| outage | at most 9,000 ms | 8,000 ms | held |" in text
    assert "| failed requests | 0 | 1 | NOT HELD |" in text
    assert "3 requests in 10 s; failed: 1 503 runner_down; kills 2." in text
    assert "*Observed on 2026-01-01: a processor, 2 CPUs, 4 GiB, Linux, CPython 3.12; parbake 0.1.0.*" in text
    # Every link of the table leads somewhere.
    assert set(re.findall(r"\(#(\S+)\)", text)) == set(re.findall(r"^## (\S+)$", text, re.MULTILINE))


def test_a_scenario_that_was_not_played_again_stays_on_the_page(tmp_path: Path) -> None:
    def found(name: str, requests: int) -> Report:
        return Report(MACHINE, (Finding(name, "b", "p", 1.0, requests=requests),))

    for name, requests in (("second", 11), ("first", 22), ("second", 33)):
        keep(found(name, requests), tmp_path, ("first", "second"))
    text = (tmp_path / "reliability.md").read_text()
    assert re.findall(r"^\| \[b\].*? \| p \| (\d+) \|", text, re.MULTILINE) == ["22", "33"]
    kept = msgspec.json.decode((tmp_path / "reliability.json").read_bytes(), type=Report)
    assert [f.requests for f in kept.findings] == [22, 33]


def test_the_terminal_shows_a_line_for_each_and_every_broken_promise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = Finding("good", "b", "p", 1.0, (none("never seen", 0),), 1000, {"503 runner_down": 4}, 0, "", 12.3)
    bad = Finding("bad", "it is cut", "p", 1.0, (Check("half of it", "at most 1 MB", 2.5, "MB", False),))
    away = Finding("away", "b", "p", 1.0, not_tested="too heavy")
    show([good, bad, away])
    out = capsys.readouterr().out
    assert re.search(r"^good +1,000 +4 +0 +12 ms +held$", out, re.MULTILINE)
    assert re.search(r"^bad +0 +0 +0 +0 ms +NOT HELD$", out, re.MULTILINE)
    assert "away was not tested here: too heavy" in out
    assert "bad: it is cut" in out
    assert re.search(r"^half of it +at most 1 MB +2.5 MB +NOT HELD$", out, re.MULTILINE)
    assert "never seen" not in out
    assert [verdict(f) for f in (good, bad, away)] == ["held", "NOT HELD", "not tested here"]


def test_what_never_came_is_kept_and_shown_as_such(tmp_path: Path) -> None:
    seen = Observed(
        [heard(noted(1))], [at_most("back after", float("inf"), 1000, "ms")], {"p99, ms": float("nan")}
    )
    found = finding(scenario(), seen, 10)
    assert not found.held
    for _ in range(2):
        keep(Report(MACHINE, (found,)), tmp_path, ("fault",))
    text = (tmp_path / "reliability.md").read_text()
    assert "| back after | at most 1,000 ms | never | NOT HELD |" in text
    assert "p99, ms never" in text


def test_yes_and_no_are_kept_as_numbers(tmp_path: Path) -> None:
    found = finding(scenario(), Observed([heard(noted(1))], [at_least("it said so", True, 1)], {}), 10)
    for _ in range(2):
        keep(Report(MACHINE, (found,)), tmp_path, ("fault",))
    assert "| it said so | at least 1 | 1 | held |" in (tmp_path / "reliability.md").read_text()
