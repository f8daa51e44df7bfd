"""The memory limit: the container's, not the host's."""

from __future__ import annotations

import os
from pathlib import Path

from parbake.runtime import memory


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/pod/container\n")
    inner = root / "pod" / "container"
    inner.mkdir(parents=True)
    whole = memory.limit(root, membership)
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (inner / "memory.max").write_text("max\n")
    (root / "pod" / "memory.max").write_text("300000000\n")
    assert memory.limit(root, membership) == 300_000_000
    (inner / "memory.max").write_text("200000000\n")
    assert memory.limit(root, membership) == 200_000_000


def test_the_limit_of_the_older_hierarchy_counts_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("100000000\n")
    assert memory.limit(tmp_path, tmp_path / "none") == 100_000_000


def test_what_a_process_holds_can_be_told() -> None:
    before = memory.resident(os.getpid())
    held = bytearray(os.urandom(1 << 20) * 64)
    assert memory.resident(os.getpid()) - before > 32 << 20
    assert len(held) == 64 << 20
    assert memory.resident(2**22 + 1) == 0
