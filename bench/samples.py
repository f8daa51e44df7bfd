"""One measurement of one server, and the figures that are read off it."""

from __future__ import annotations

import math
import urllib.request
from dataclasses import dataclass

from bench.clients import Speed


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one server."""

    speed: Speed
    cpu_us: float = math.nan
    """CPU time of the server per request."""


def rate(sample: Sample) -> float:
    """Requests per second."""
    return sample.speed.requests_per_s


def p50(sample: Sample) -> float:
    """Median latency, in milliseconds."""
    return sample.speed.p50_ms


def p99(sample: Sample) -> float:
    """99th percentile of the latency, in milliseconds."""
    return sample.speed.p99_ms


def cpu(sample: Sample) -> float:
    """CPU time of the server per request, in microseconds."""
    return sample.cpu_us


def counted(url: str, *names: str, label: str = "") -> list[float]:
    """Counters of the server at a URL, each summed over its labels, or over those series that have ``label``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return [
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{") and label in line)
        for name in names
    ]


def rows_and_hits(url: str) -> tuple[float, float]:
    """Rows answered so far by the server at a URL, and those of them without the model."""
    rows, hits = counted(url, "parbake_rows_total", "parbake_table_hits_total")
    return rows, hits


def rows_warmed(url: str) -> float:
    """Rows that the server at a URL has baked without anybody waiting for them."""
    return counted(url, "parbake_head_changes_total", label='"warmed"')[0]
