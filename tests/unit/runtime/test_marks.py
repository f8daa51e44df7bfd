"""Marks outlive the process that made them, and nobody is held up by what stands in their place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from parbake.runtime.marks import LOADING, NOTHING, Marks, read, was_at_work

MODELS = 8


def test_each_model_has_a_mark_of_its_own(tmp_path: Path) -> None:
    path = str(tmp_path / "marks")
    marks = Marks(Path(path), MODELS)
    for slot in range(MODELS):
        marks.reserve(slot)
    marks.put(2, (1 << 63) + 5)
    marks.put(7, LOADING)
    assert [read(path, slot) for slot in range(MODELS)] == [
        NOTHING, NOTHING, (1 << 63) + 5, NOTHING, NOTHING, NOTHING, NOTHING, LOADING
    ]  # fmt: skip
    assert was_at_work(path, 2, (1 << 63) + 5)
    assert not was_at_work(path, 2, 5)
    assert not was_at_work(path, 1, 5)


def test_marks_of_a_process_that_ended_stand_until_the_next_one_puts_others(tmp_path: Path) -> None:
    path = str(tmp_path / "marks")
    source = (
        "import os, sys; from pathlib import Path; from parbake.runtime.marks import Marks;"
        f"marks = Marks(Path(sys.argv[1]), {MODELS}); marks.reserve(3); marks.put(3, 42); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", source, path], check=False).returncode == 9
    assert was_at_work(path, 3, 42)
    after = Marks(Path(path), MODELS)
    after.reserve(3)
    assert was_at_work(path, 3, 42)
    after.put(3, NOTHING)
    assert not was_at_work(path, 3, 42)


def test_where_nobody_can_tell_it_was_at_work(tmp_path: Path) -> None:
    missing, short, link, pipe = (str(tmp_path / name) for name in ("missing", "short", "link", "pipe"))
    Path(short).write_bytes(b"123")
    Path(tmp_path / "sound").write_bytes(bytes(64))
    Path(link).symlink_to(tmp_path / "sound")
    # To open one that nobody writes to would take for ever.
    os.mkfifo(pipe)
    for path in (missing, short, link, pipe, str(tmp_path)):
        assert read(path, 0) is None
        assert was_at_work(path, 0, 42)
