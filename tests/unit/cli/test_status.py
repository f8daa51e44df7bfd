"""What `parbake status` shows to a person."""

from __future__ import annotations

from typing import Any

import pytest

from parbake.app.supervisor import Status, VersionStatus
from parbake.cli.status import show


def version(name: str, **other: Any) -> VersionStatus:
    values: dict[str, Any] = {
        "version": "1",
        "mode": "dynamic",
        "digest": "sha256:0123456789abcdef",
        "bundle": f"/models/{name}",
        "table": "",
        "table_rows": 0,
        "placement": "process",
        "row_us": 1.0,
        "hop_us": 1.0,
        "owner": "team@example.com",
        "purpose": "p",
        "runner_pids": (11,),
        "runner_restarts": 0,
    }
    return VersionStatus(name, **{**values, **other})


def test_each_version_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    versions = (
        version("eta", requests=1234567, errors=3, runner_restarts=2, runner_pids=(11, 12)),
        version(
            "fare",
            mode="hybrid",
            table="/t",
            table_rows=9000,
            table_expires=900.0,
            auto=True,
            head_rows=1200,
            requests=10,
            rows=40,
            baked_rows=30,
        ),
        version("tip", mode="static", table="/t", table_rows=5, table_expires=2000.0, placement="inline"),
        version("small", placement="inline", runner_pids=()),
    )
    show(Status(7, 3, 1000.0 - 7200, (8, 9), 1, None, ("gone",), versions), 1000.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "process 7, started 2 hours ago"
    assert lines[1] == "2 fronts, started again 1 time; what is served was changed 2 times"
    cells = [[cell for cell in line.split("   ") if cell] for line in lines[4:8]]
    told = [[cell.strip() for cell in line] for line in cells]
    end = "team@example.com"
    digest = "sha256:0123456789ab"
    assert told == [
        ["eta", "1", "dynamic", digest, "-", "-", "1,234,567", "-", "3", "2 runners", "2", end],
        [
            "fare",
            "1",
            "hybrid (auto)",
            digest,
            "9,000 expired",
            "1,200",
            "10",
            "75 %",
            "0",
            "1 runner",
            "0",
            end,
        ],
        ["tip", "1", "static", digest, "5", "-", "0", "-", "0", "-", "0", end],
        ["small", "1", "dynamic", digest, "-", "-", "0", "-", "0", "fronts", "0", end],
    ]
    assert lines[-1] == "not loaded: gone"


def test_of_several_versions_it_is_said_who_answers(capsys: pytest.CaptureFixture[str]) -> None:
    versions = (version("eta", version="1", share=0.8), version("eta", version="2", share=0.2))
    show(Status(7, 3, 1000.0 - 7200, (8, 9), 1, None, (), versions), 1000.0)
    told = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[3:]]
    assert told == [["model", "version", "traffic"], ["eta", "1", "80"], ["eta", "2", "20"]]
