"""The CPU quota: the container's, not the host's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parbake.runtime.cpu import quota

CPUS = 16


@pytest.fixture(autouse=True)
def _many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine of the test has fewer than a host in a cluster.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CPUS)), raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    file = tmp_path / "membership"
    file.write_text("0::/pod/container\n")
    return file


def v2(folder: Path, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(limit)


def v1(root: Path, quota_us: str, period_us: str = "100000") -> None:
    folder = root / "cpu"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(quota_us)
    (folder / "cpu.cfs_period_us").write_text(period_us)


def test_without_a_limit_all_cpus_that_may_be_used_count(root: Path, membership: Path) -> None:
    assert quota(root, membership) == CPUS
    v2(root / "pod" / "container", "max 100000\n")
    assert quota(root, membership) == CPUS


@pytest.mark.parametrize(("limit", "cpus"), [("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1)])
def test_a_limit_of_version_2_is_rounded_down_and_never_to_none(
    root: Path, membership: Path, limit: str, cpus: int
) -> None:
    v2(root / "pod" / "container", limit)
    assert quota(root, membership) == cpus


def test_the_tightest_limit_on_the_way_up_counts(root: Path, membership: Path) -> None:
    v2(root / "pod" / "container", "800000 100000")
    v2(root / "pod", "400000 100000")
    v2(root, "max 100000")
    assert quota(root, membership) == 4


def test_inside_a_namespace_the_root_is_the_own_group(root: Path, tmp_path: Path) -> None:
    membership = tmp_path / "namespace"
    membership.write_text("0::/\n")
    v2(root, "300000 100000")
    assert quota(root, membership) == 3
    membership.write_text("0::/../sibling\n")
    assert quota(root, membership) == 3


@pytest.mark.parametrize(("quota_us", "cpus"), [("250000", 2), ("-1", CPUS), ("10000", 1)])
def test_a_limit_of_version_1(root: Path, membership: Path, quota_us: str, cpus: int) -> None:
    v1(root, quota_us)
    assert quota(root, membership) == cpus


def test_a_limit_above_what_may_be_used_changes_nothing(root: Path, membership: Path) -> None:
    v2(root / "pod" / "container", "6400000 100000")
    assert quota(root, membership) == CPUS


def test_here_it_is_at_least_one() -> None:
    assert quota() >= 1
