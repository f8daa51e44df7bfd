"""What a running server refuses, as whoever asked it is told."""

from __future__ import annotations

import io
import json
from email.message import Message
from typing import Any
from urllib.error import HTTPError

import msgspec
import pytest

from parbake.errors import GateRefused, ParbakeError, ServerNotFound
from parbake.release.gate import Check, GateReport
from parbake.transports.client import _refusal
from parbake.transports.http.replies import error_reply

REPORT = GateReport(
    "eta.bundle", "eta", "sha256:41c2", "", "", (Check("metadata", "failed", "no owner"),), False
)
REFUSED = GateRefused("version '3' must not take traffic", hint="parbake gate looks again", report=REPORT)


def told(body: bytes) -> ParbakeError:
    return _refusal(HTTPError("http://127.0.0.1:8002", 409, "Conflict", Message(), io.BytesIO(body)))


def test_what_the_gate_found_comes_with_the_refusal() -> None:
    error = told(error_reply(REFUSED)[1])
    assert isinstance(error, GateRefused)
    assert (error.message, error.hint, error.report) == (REFUSED.message, REFUSED.hint, REPORT)


@pytest.mark.parametrize(
    "gate",
    [
        None,
        "schema did not pass",
        {"bundle": "eta.bundle"},
        {**msgspec.to_builtins(REPORT), "checks": [{"name": "metadata", "verdict": "doubtful", "words": ""}]},
    ],
)
def test_a_refusal_by_a_server_of_another_version_is_a_refusal_without_the_table(gate: Any) -> None:
    error = told(json.dumps({**json.loads(error_reply(REFUSED)[1]), "gate": gate}).encode())
    assert isinstance(error, GateRefused)
    assert (error.message, error.hint, error.report) == (REFUSED.message, REFUSED.hint, None)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"no"'])
def test_what_is_no_refusal_of_a_server_is_told_by_its_status(body: bytes) -> None:
    error = told(body)
    assert isinstance(error, ServerNotFound)
    assert error.message == "the server answered 409"
