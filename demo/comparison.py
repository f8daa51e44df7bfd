"""The same traffic at each way to serve, one after another, every answer held against scikit-learn's own."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bench.load import Load, Measured, Outputs, put
from demo.digits import Images

MODES: Final = ("dynamic", "static", "hybrid")


class Disagreement(Exception):
    """An answer was not what it must be; the message says which."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one mode did with the traffic."""

    mode: str
    measured: Measured
    coverage: float
    """Share of requests answered from the table, as the server counted them."""

    @property
    def agreement(self) -> float:
        """Share of the predictions that equal scikit-learn's."""
        return self.measured.right / (self.measured.right + self.measured.wrong)


def request_body(image: Images) -> bytes:
    """One image as a request of the Open Inference Protocol."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, len(image)], "data": image.tolist()}
    return msgspec.json.encode({"inputs": [tensor]})


def compare(
    port: int,
    bodies: Sequence[bytes],
    expected: Sequence[Outputs],
    order: Sequence[int],
    baked: Collection[int],
    *,
    seconds: float,
    connections: int,
    stage: Callable[[str], None],
) -> list[Row]:
    """Replay the traffic at ``digits-<mode>`` of every mode. Raises `Disagreement`.

    ``baked`` are the numbers of the bodies in the table: static mode must answer these and no others.
    """
    rows: list[Row] = []
    for mode in MODES:
        stage(f"at digits-{mode}")
        before = _counts(port, f"digits-{mode}")
        measured = put(
            Load(
                port=port,
                path=f"/v2/models/digits-{mode}/infer",
                bodies=tuple(bodies),
                order=tuple(order),
                connections=connections,
                seconds=seconds,
                expected=tuple(expected),
            )
        )
        after = _counts(port, f"digits-{mode}")
        requests, hits = after[0] - before[0], after[1] - before[1]
        held_against(mode, measured, set(baked))
        if requests != measured.right + measured.unknown:
            raise Disagreement(
                f"{mode}: the server counted {requests} requests, the load generator got "
                f"{measured.right + measured.unknown} replies"
            )
        rows.append(Row(mode, measured, hits / requests))
    return rows


def held_against(mode: str, measured: Measured, baked: set[int]) -> None:
    """Raise `Disagreement` unless the mode did what it must.

    Every prediction must be right; 404 is for static mode only, for exactly the images that are not ``baked``.
    """
    if measured.failed or measured.wrong or not measured.right:
        raise Disagreement(
            f"{mode}: {measured.wrong} wrong predictions, {measured.failed} failures, {measured.right} right; "
            f"first: {measured.complaint or 'no reply at all'}"
        )
    if mode != "static":
        if measured.unknown:
            raise Disagreement(f"{mode}: {measured.unknown} requests got 404")
        return
    if strangers := set(measured.bodies_answered) - baked:
        raise Disagreement(
            f"static answered {len(strangers)} images that were never baked: {min(strangers)}, ..."
        )
    if missing := set(measured.bodies_unknown) & baked:
        raise Disagreement(f"static does not know {len(missing)} images that were baked: {min(missing)}, ...")


def _counts(port: int, deployment: str) -> tuple[int, int]:
    """Requests and table hits of a deployment so far, from the server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    totals = {"parbake_requests_total": 0.0, "parbake_table_hits_total": 0.0}
    for family in families:
        for sample in family.samples:
            if sample.name in totals and sample.labels.get("deployment") == deployment:
                totals[sample.name] += sample.value
    return int(totals["parbake_requests_total"]), int(totals["parbake_table_hits_total"])


def meaning(rows: Sequence[Row], baked: int) -> str:
    """What the figures say, in one sentence."""
    by_mode = {row.mode: row for row in rows}
    hybrid, static, dynamic = (by_mode[mode] for mode in ("hybrid", "static", "dynamic"))
    factor = hybrid.measured.requests_per_s / dynamic.measured.requests_per_s
    answered = static.measured.right / (static.measured.right + static.measured.unknown)
    if factor >= 1.05:
        speed = f"{factor:.1f} times as many requests per second as the model alone"
    elif factor > 0.95:
        speed = "as many requests per second as the model alone"
    else:
        speed = f"only {factor:.2f} times as many requests per second as the model alone"
    return (
        f"With {hybrid.coverage:.0%} of the requests found among the {baked:,} images of the table and those that it "
        f"kept on the way, hybrid answers {speed}, "
        f"each with the very bits of the model; static needs no model at all and has an answer to {answered:.0%}."
    )
