"""``python -m fuzz [TARGET]... [--minutes N]``: libFuzzer, by way of Atheris, on everything that reads bytes.

Each target runs in a process of its own, begins with the corpus in the repository (``fuzz/corpus/TARGET``), and ends at
its first crash; the bytes that did it are left in ``fuzz/found``. What the runs came to is written to
``docs/fuzzing.md``. With ``--keep`` the smallest set of inputs that reaches all that was reached goes into the corpus.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from bench.machine import this_machine
from fuzz.targets import TARGETS
from parbake.cli.output import emit, say

HERE: Final = Path(__file__).parent
PAGE: Final = HERE.parent / "docs" / "fuzzing.md"
_MAX_BYTES: Final = 4096
_KEPT_BYTES: Final = 1024
_MOST_KEPT: Final = 40
_MERGE_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Found:
    """What fuzzing one target came to."""

    target: str
    seconds: float
    inputs: int
    reached: int
    """Edges and features of our code, as libFuzzer counts them."""
    crash: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz; gives 1 where something crashed."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description="Fuzz everything that reads what others wrote."
    )
    parser.add_argument("what", nargs="*", choices=[*TARGETS, []], help="what to fuzz  [default: everything]")
    parser.add_argument("--minutes", type=float, default=30.0, help="in all  [default: 30]")
    parser.add_argument("--keep", action="store_true", help="add what reached more to the corpus")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write  [default: docs/fuzzing.md]")
    options = parser.parse_args(arguments)
    if find_spec("atheris") is None:
        say("error: Atheris is not installed")
        say("hint: make fuzz installs it (Linux, Python 3.11 to 3.13)")
        return 4
    targets = options.what or list(TARGETS)
    seconds = max(int(60 * options.minutes / len(targets)), 1)
    found: list[Found] = []
    for target in targets:
        say(f"{target}: {seconds} s")
        found.append(fuzz(target, seconds, keep=options.keep))
        last = found[-1]
        say(f"{target}: {last.inputs:,} inputs, {last.crash or 'no crash'}")
    crashes = [one for one in found if one.crash]
    if not options.what:
        options.out.write_text(page(found), encoding="utf-8")
        say(f"written: {options.out}")
    for one in crashes:
        emit(f"{one.target} crashed: {one.crash}")
    return 1 if crashes else 0


def corpus_of(target: str) -> list[Path]:
    """The inputs that are kept for a target."""
    return sorted((HERE / "corpus" / target).iterdir())


def fuzz(target: str, seconds: int, *, keep: bool = False) -> Found:
    """Run libFuzzer on one target for so long, or until it crashes."""
    crashes = HERE / "found"
    crashes.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="parbake-corpus-") as folder:
        corpus = Path(folder) / "all"
        corpus.mkdir()
        for path in corpus_of(target):
            (corpus / path.name).write_bytes(path.read_bytes())
        command = [sys.executable, "-m", "fuzz.session", target]
        started = time.monotonic()
        done = subprocess.run(
            [
                *command, str(corpus), f"-max_total_time={seconds}", f"-max_len={_MAX_BYTES}", "-timeout=20",
                "-rss_limit_mb=2048", "-print_final_stats=1", f"-artifact_prefix={crashes}/{target}-",
            ],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        took = time.monotonic() - started
        if keep and done.returncode == 0:
            least = Path(folder) / "least"
            least.mkdir()
            with suppress(subprocess.TimeoutExpired):
                # A library with threads of its own may stand still where libFuzzer goes on in a child.
                subprocess.run(
                    [*command, "-merge=1", str(least), str(corpus)],
                    capture_output=True,
                    check=False,
                    timeout=_MERGE_S,
                )
            _keep(target, least)
    inputs = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    reached = re.findall(r"\bft: (\d+)", done.stderr)
    crash = ""
    if done.returncode != 0:
        words = re.search(r"=== Uncaught Python exception: ===\n(.+)", done.stderr) or re.search(
            r"ERROR: (.+)", done.stderr
        )
        crash = words[1].strip() if words else f"exit status {done.returncode}"
    return Found(target, took, int(inputs[1]) if inputs else 0, int(reached[-1]) if reached else 0, crash)


def _keep(target: str, least: Path) -> None:
    """Put the smallest of the inputs into the corpus in the repository."""
    new = sorted(least.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    for path in new[:_MOST_KEPT]:
        data = path.read_bytes()
        if 0 < len(data) <= _KEPT_BYTES:
            (HERE / "corpus" / target / sha256(data).hexdigest()[:16]).write_bytes(data)


def page(found: Sequence[Found]) -> str:
    """The record, as a page of the documentation."""
    machine = this_machine()
    minutes = sum(one.seconds for one in found) / 60
    crashes = sum(bool(one.crash) for one in found)
    told = (
        f"{datetime.now(UTC):%Y-%m-%d}: {minutes:.0f} minutes, {sum(one.inputs for one in found):,} inputs, "
        f"{crashes or 'no'} crash{'es' if crashes > 1 else ''}. Atheris {version('atheris')}, "
        f"Python {machine.python}, {machine.system}."
    )
    lines = [
        "# Fuzzing",
        "",
        "Everything that reads what others wrote is fuzzed: `make fuzz` runs libFuzzer on each target, led by the",
        "coverage of our code, and writes this page. The inputs that it begins with are in `fuzz/corpus`; `make test`",
        "runs each of them. Hypothesis has tests of its own, against a running server.",
        "",
        told,
        "",
        "| target | what it reads | minutes | inputs | coverage (features) | |",
        "|---|---|--:|--:|--:|---|",
    ]
    lines += [
        f"| `{one.target}` | {TARGETS[one.target].what} | {one.seconds / 60:.1f} | {one.inputs:,} | {one.reached:,} "
        f"| {one.crash or 'no crash'} |"
        for one in found
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
