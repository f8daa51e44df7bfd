"""What `parbake check` prints for each way in which a bundle can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from parbake.app.check import CheckReport
from parbake.cli.check import checks, show
from parbake.contract.environment import Difference

SOUND = CheckReport(
    Path("d"), "doubler", "sha256:1", digest_ok=True, golden_rows=7, differing_rows=0, max_abs_diff=0.0
)


def verdicts(report: CheckReport) -> list[bool | None]:
    """The verdict of each check."""
    return [passed for _, passed, _ in checks(report)]


def test_a_sound_bundle_passes_everything() -> None:
    assert verdicts(SOUND) == [True, True, True]
    assert SOUND.ok


def test_a_difference_within_the_tolerance_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(CheckReport(Path("d"), "doubler", "sha256:1", True, 7, 0, 1e-7))
    assert (
        "ok   goldens       7 rows answered as they must be, largest difference 1e-07"
        in capsys.readouterr().out
    )


def test_differing_goldens_are_counted_and_the_first_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    report = CheckReport(
        Path("d"), "doubler", "sha256:1", True, 7, 2, 0.5, "row 3, output 'y': expected 1, got 1.5"
    )
    assert verdicts(report) == [True, True, False]
    show(report)
    out = " ".join(capsys.readouterr().out.split())
    assert "BAD goldens 2 of 7 rows differ; first: row 3, output 'y': expected 1, got 1.5" in out
    assert out.endswith("doubler: must not be served here")


def test_a_missing_library_fails_only_if_the_bundle_needs_it(capsys: pytest.CaptureFixture[str]) -> None:
    def report(required: bool) -> CheckReport:
        item = Difference("scipy", "1.17.1", "not installed", required)
        return CheckReport(Path("d"), "doubler", "sha256:1", True, 7, 0, 0.0, differences=(item,))

    assert verdicts(report(False)) == [True, True, True]
    assert verdicts(report(True)) == [True, False, True]
    show(report(True))
    assert "scipy   1.17.1   not installed   yes" in capsys.readouterr().out
    show(report(False))
    out = capsys.readouterr().out
    assert "scipy" not in out
    assert "not here and not needed: 1 libraries" in out


def test_what_was_not_reached_is_neither_good_nor_bad() -> None:
    assert verdicts(CheckReport(Path("d"), error="torn")) == [False, None, None]
    assert verdicts(CheckReport(Path("d"), "doubler", "sha256:1", True, error="ValueError: no")) == [
        True,
        True,
        False,
    ]
