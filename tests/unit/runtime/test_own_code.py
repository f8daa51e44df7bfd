"""A bundle's own source: what runs is what the digest says."""

from __future__ import annotations

import importlib.util
import os
import py_compile
from pathlib import Path

from parbake.runtime.own_code import load_function


def test_a_compiled_file_beside_the_source_is_not_what_runs(tmp_path: Path) -> None:
    source = tmp_path / "altered.py"
    source.write_text("def answer():\n    return 666\n")
    # With the time and size of the good source, Python itself would take it; the other needs no source at all.
    for compiled in (importlib.util.cache_from_source(str(source)), tmp_path / "altered.pyc"):
        py_compile.compile(str(source), cfile=str(compiled), doraise=True)
    stat = source.stat()
    source.write_text("def answer():\n    return 111\n")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.stat().st_size == stat.st_size
    assert load_function(tmp_path, "altered:answer")() == 111
