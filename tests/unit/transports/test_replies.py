"""Errors as HTTP: every class has a status, and the body says what, where and what to do."""

from __future__ import annotations

import json

import pytest

from parbake import errors
from parbake.errors import MethodNotAllowed, MissingExtra, ModelFailed, Overloaded, ParbakeError, RunnerDown
from parbake.transports.failures import shown
from parbake.transports.http.replies import error_reply, status_of


def tree(kind: type[ParbakeError] = ParbakeError) -> list[type[ParbakeError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in tree(child))]


STATUSES = {
    "error": 500, "invalid_request": 400, "malformed_body": 400, "invalid_input": 400, "too_large": 413,
    "row_rejected": 422, "row_quarantined": 422, "unauthenticated": 401, "not_allowed": 403, "conflict": 409,
    "not_found": 404, "model_not_found": 404,
    "version_not_found": 404, "route_not_found": 404, "method_not_allowed": 405, "key_not_baked": 404,
    "unavailable": 503, "overloaded": 503, "rate_limited": 429,
    "deadline_exceeded": 504, "runner_down": 503, "not_ready": 503,
    "model_failed": 500, "bundle_error": 422, "bundle_torn": 422, "bundle_altered": 422, "bundle_too_new": 422,
    "bundle_unsigned": 422, "goldens_differ": 422,
    "environment_differs": 422, "table_error": 422, "table_missing": 422, "table_torn": 422,
    "table_foreign": 422, "table_too_new": 422, "pack_refused": 422, "parity_refused": 422, "not_convertible": 422,
    "lease_lost": 409, "state_away": 503, "state_error": 500, "state_torn": 500, "state_too_new": 500,
    "bundle_missing": 404, "registry_away": 503, "store_away": 503, "register_refused": 422,
    "gate_refused": 409,
    "job_not_found": 404, "job_cancelled": 409, "job_dead": 500, "queue_away": 503, "queue_torn": 503,
    "input_file": 422, "settings": 422, "missing_extra": 501, "missing_program": 501,
    "build_failed": 500, "server_not_found": 502,
}  # fmt: skip


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_every_class_of_errors_has_its_status(kind: type[ParbakeError]) -> None:
    assert status_of(kind) == STATUSES[kind.code]
    error = (
        MissingExtra("torch", "torch")
        if kind is MissingExtra
        else kind("it is so", hint="do this", path="$.x")
    )
    status, payload, headers = error_reply(error)
    body = json.loads(payload)
    assert status == STATUSES[kind.code]
    assert body["code"] == kind.code
    assert error.message in body["error"]
    assert ("retry-after" in {name.decode() for name, _ in headers}) == issubclass(kind, errors.Unavailable)


def test_the_table_of_statuses_is_whole() -> None:
    assert {kind.code for kind in tree()} == set(STATUSES)


def test_the_body_has_path_hint_and_number_where_there_are_any() -> None:
    _, payload, _ = error_reply(ParbakeError("it is so"))
    assert json.loads(payload) == {"error": "it is so", "code": "error"}
    _, payload, _ = error_reply(ParbakeError("it is so", hint="do this", path="$.x"), "c0ffee")
    assert json.loads(payload) == {
        "error": "it is so at $.x", "code": "error", "path": "$.x", "hint": "do this", "correlation_id": "c0ffee",
    }  # fmt: skip


def test_retry_after_is_in_whole_seconds_and_never_at_once() -> None:
    assert error_reply(Overloaded("full", retry_after_s=0.05))[2] == ((b"retry-after", b"1"),)
    assert error_reply(RunnerDown("gone", retry_after_s=2.1))[2] == ((b"retry-after", b"3"),)


def test_a_wrong_method_is_told_the_right_ones() -> None:
    assert error_reply(MethodNotAllowed("DELETE /v2", methods=("GET", "HEAD")))[2] == (
        (b"allow", b"GET, HEAD"),
    )


def test_what_a_model_raised_stays_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    error, number = shown(ModelFailed("division by zero in secret.py"), "eta")
    assert "secret" not in error.message + error.hint
    assert number in error.hint
    other = ParbakeError("of no interest")
    assert shown(other, "eta") == (other, "")
