"""What is written behind --set, and how evidence looks in a terminal."""

from __future__ import annotations

import json

import click
import pytest

from parbake.app.releases import ReleaseStatus, TuningChange
from parbake.app.trial import Tuning, tuned, tuning_of
from parbake.cli.deploy import _margin, _show_refusal
from parbake.cli.pictures import evidence_bar
from parbake.cli.release import _change, show
from parbake.errors import GateRefused, SettingsError
from parbake.release.gate import Check, GateReport
from parbake.release.judge import Decision, Evidence, Margins, Verdict
from parbake.release.model import Parameters


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("every=10m", "every_s", 600.0), ("every=90", "every_s", 90.0), ("hold=on", "hold", True),
        ("kill=off", "kill", False), ("p99=0.2", "p99", 0.2), ("p99=", "p99", None), ("requests=50", "requests", 50),
    ],
)  # fmt: skip
def test_parameters_are_read_as_they_are_written(text: str, name: str, value: float | bool | None) -> None:
    assert _change(text) == (name, value)
    TuningChange(dict([_change(text)]))


@pytest.mark.parametrize("text", ["p99", "p99=much", "every=soon", "hold=perhaps"])
def test_what_is_no_parameter_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.UsageError, match=r"p99=0\.2"):
        _change(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("evry=1h", "no parameter 'evry': did you mean 'every'?"),
        ("timeout=50", "did you mean 'timeout_ms'?"),
        ("colour=red", "there are hold, kill, every, timeout_ms"),
    ],
)
def test_a_parameter_that_is_mistyped_is_told_what_is_near(text: str, says: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        _change(text)
    assert says in refused.value.message
    with pytest.raises(SettingsError, match="did you mean 'p99'"):
        tuned(Parameters("eta", 0, {}), 7, {"p9": 1})
    with pytest.raises(click.UsageError, match="did you mean 'failures'"):
        _margin("failure=1")


def test_parameters_are_for_the_release_that_they_were_set_for_and_hold_stays() -> None:
    none = Parameters("eta", 0, {})
    first = Parameters("eta", 1, tuned(none, 7, {"hold": True, "p99": 0.3}))
    assert tuning_of(first, 7) == Tuning(hold=True, p99=0.3)
    assert tuning_of(first, 8) == Tuning(hold=True)
    second = Parameters("eta", 2, tuned(first, 7, {"p99": None, "every_s": 5}))
    assert tuning_of(second, 7) == Tuning(hold=True, every_s=5)
    assert tuning_of(second, 7).margins(Margins(p50=0.4)) == Margins(p50=0.4)
    assert tuning_of(first, 7).margins(Margins(p50=0.4)) == Margins(p50=0.4, p99=0.3)
    for wrong in ({"p98": 1}, {"every_s": -1}, {"timeout_ms": 0}, {"hold": "yes"}):
        with pytest.raises(SettingsError, match="cannot be"):
            tuned(none, 7, wrong)
    with pytest.raises(SettingsError, match="alpha"):
        Tuning(alpha=2).margins(Margins())


@pytest.mark.parametrize(
    ("state", "decision", "judge", "compared"),
    [
        ("running", Decision.HOLD, "judge: hold: not enough yet", "of 10 requests, beside 90 of version 1"),
        ("rolled_back", Decision.ROLL_BACK, "judge: roll back: not enough yet",
         "when it ended: of 10 requests, beside 90 of version 1"),
        ("live", Decision.PROMOTE, "judge: promote: not enough yet",
         "when it ended: of 10 requests, beside 90 of version 1"),
        # By hand.
        ("rolled_back", Decision.HOLD, "before it ended, the judge said: hold: not enough yet", ""),
        ("rolled_back", Decision.PROMOTE, "before it ended, the judge said: promote: not enough yet", ""),
        ("superseded", Decision.PROMOTE, "before it ended, the judge said: promote: not enough yet", ""),
    ],
)  # fmt: skip
def test_what_the_judge_said_of_a_release_that_has_ended_is_not_shown_as_if_it_ran(
    state: str, decision: Decision, judge: str, compared: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = Evidence("failures", "", "1 % beside 1 %", 0.01, 0.01, 0.5, 2.0)
    verdict = Verdict(decision, "not enough yet", (evidence,))
    show(ReleaseStatus("eta", "2", "1", state, "canary", 0.1, 0, (0.1, 1.0), 0.0, verdict, (90, 10), "1"))
    lines = capsys.readouterr().out.splitlines()
    assert judge in lines
    assert (compared in lines) == bool(compared)
    assert any("1 % beside 1 %" in line for line in lines) == bool(compared)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_gate_refuses_has_a_line_for_each_check_or_all_of_it_as_json(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = (
        Check("metadata", "failed", "no owner", hint="pack again with --purpose and --owner"),
        Check("latency", "unknown", "not measured, as the model did not run"),
        Check("schema", "passed", "the same for callers"),
    )
    report = GateReport("eta.bundle", "eta", "sha256:41c2", "", "", checks, False)
    refusal = GateRefused("version '3' of 'eta' must not take traffic", report=report)
    _show_refusal("eta", "3", refusal, as_json=as_json)
    out, err = capsys.readouterr()
    if as_json:
        told = json.loads(out)
        assert (told["deployment"], told["version"], told["state"], err) == ("eta", "3", "refused", "")
        assert [check["verdict"] for check in told["gate"]["checks"]] == ["failed", "unknown", "passed"]
        return
    assert [line.split(maxsplit=2)[:2] for line in out.splitlines()[:3]] == [
        ["metadata", "failed"], ["latency", "unknown"], ["schema", "passed"],
    ]  # fmt: skip
    assert err.splitlines() == [
        "metadata: pack again with --purpose and --owner; or --waive metadata --why TEXT",
        "latency: --waive latency --why TEXT",
    ]


def test_evidence_is_a_bar_that_is_legible_without_colours() -> None:
    assert evidence_bar(0.5, plain=True) == "#####     |  50 %"
    assert evidence_bar(-3.0, plain=True) == "          |   0 %"
    assert evidence_bar(7.0, plain=False) == "██████████| 100 %"
