"""`make chaos`'s program breaks servers, tells what it saw, and ends with 1 where a promise did not hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chaos import __main__ as command
from chaos.catalogue import ALL
from chaos.load import Heard, Noted
from chaos.model import NotTested, Observed, Scenario, Stage, at_most, none

ROOT = Path(__file__).parents[2]


def chaos(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The program, as make runs it."""
    return subprocess.run(
        [sys.executable, "-m", "chaos", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_breaks_a_server_and_writes_down_what_was_seen(tmp_path: Path) -> None:
    done = chaos("table-deleted", "--quick", "--lenient", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^table-deleted +[1-9][\d,]+ .* (held|late)$", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout
    report = json.loads((tmp_path / "reliability.json").read_text())
    (finding,) = report["findings"]
    assert finding["name"] == "table-deleted"
    assert finding["requests"] > 300
    assert finding["wrong"] == 0
    assert all(check["held"] or check["nearly"] for check in finding["checks"])
    assert "## table-deleted" in (tmp_path / "reliability.md").read_text()


def test_without_a_folder_a_quick_run_leaves_the_page_as_it_is() -> None:
    page = ROOT / "docs" / "reliability.md"
    before = page.read_bytes()
    done = chaos("too-few-rows", "--quick", "--lenient", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["name"] == "too-few-rows"
    assert finding["failed"]["500 model_failed"] > 0
    assert page.read_bytes() == before


def test_every_scenario_says_what_it_breaks_and_what_is_promised() -> None:
    done = chaos("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(ALL)
    assert len(ALL) >= 20
    for scenario in ALL.values():
        assert scenario.broken
        assert scenario.promised


def scenario(play: object) -> Scenario:
    return Scenario("made-up", "nothing", "everything", play)  # type: ignore[arg-type]  # it is called in one way only


def one(check: float, code: str = "") -> Observed:
    return Observed([Heard("callers", (Noted(0, 1, 200, code, 0),), "", 0, 1)], [none("x", check)], {})


def late(ms: float, failed: float = 0) -> Observed:
    return Observed([], [none("x", failed), at_most("longest time without an answer", ms, 3, "ms")], {})


@pytest.mark.parametrize(
    ("seen", "status"),
    [(one(0), 0), (one(1), 1), (one(0, "wrong"), 1), (NotTested("no moon"), 0), (OSError("torn"), 1)],
    ids=["held", "not held", "a wrong answer", "not tested here", "it did not come to its end"],
)
def test_the_exit_status_tells_whether_every_promise_held(
    seen: Observed | Exception,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def play(stage: Stage) -> Observed:
        if isinstance(seen, Exception):
            raise seen
        return seen

    monkeypatch.setitem(ALL, "made-up", scenario(play))
    assert command.main(["made-up", "--quick"]) == status
    out = capsys.readouterr().out
    if isinstance(seen, Exception):
        assert str(seen) in out


@pytest.mark.parametrize(
    ("seen", "status", "words"),
    [
        (late(9), 0, "over their limits"),
        (late(16), 1, "did not hold"),
        (late(9, failed=1), 1, "did not hold"),
        (late(1), 0, "every promise held"),
    ],
    ids=["late", "far too late", "late and wrong", "in time"],
)
def test_to_the_lenient_only_what_is_late_and_not_far_does_not_count(
    seen: Observed,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(ALL, "made-up", scenario(lambda stage: seen))
    assert command.main(["made-up", "--quick", "--lenient"]) == status
    assert words in capsys.readouterr().out
    assert command.main(["made-up", "--quick"]) == int(not words.startswith("every"))


def test_what_is_written_down_is_held_to_its_limits() -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(["drain", "--lenient"])
    assert refused.value.code == 2
