"""Errors as HTTP: one status for each class of `parbake.errors`, the rest as JSON."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from parbake import errors
from parbake.errors import MethodNotAllowed, ParbakeError, Unauthenticated, Unavailable

STATUSES: Final[dict[type[ParbakeError], int]] = {
    errors.MalformedBody: 400,
    errors.InvalidInput: 400,
    errors.RequestTooLarge: 413,
    errors.RowRejected: 422,
    errors.Unauthenticated: 401,
    errors.NotAllowed: 403,
    errors.Conflict: 409,
    errors.InvalidRequest: 400,
    errors.MethodNotAllowed: 405,
    errors.NotFound: 404,
    errors.Overloaded: 503,
    errors.RateLimited: 429,
    errors.DeadlineExceeded: 504,
    errors.Unavailable: 503,
    errors.ModelFailed: 500,
    errors.BundleError: 422,
    errors.TableError: 422,
    errors.RegisterRefused: 422,
    errors.PackRefused: 422,
    errors.InputFileError: 422,
    errors.SettingsError: 422,
    errors.MissingExtra: 501,
    errors.MissingProgram: 501,
    errors.BuildFailed: 500,
    errors.ServerNotFound: 502,
    errors.ParbakeError: 500,
}
"""A class without a line of its own has that of its nearest ancestor."""


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every reply that is not a success; ``error`` is where the Open Inference Protocol has it."""

    error: str
    code: str
    path: str = ""
    hint: str = ""
    correlation_id: str = ""
    gate: object = None
    """All checks, where the gate refused a version."""


def status_of(kind: type[ParbakeError]) -> int:
    """The HTTP status of a class of errors."""
    return next(STATUSES[ancestor] for ancestor in kind.__mro__ if ancestor in STATUSES)


def error_reply(
    error: ParbakeError, correlation_id: str = ""
) -> tuple[int, bytes, tuple[tuple[bytes, bytes], ...]]:
    """Status, body and extra headers."""
    message = f"{error.message} at {error.path}" if error.path else error.message
    report = error.report if isinstance(error, errors.GateRefused) else None
    body = ErrorBody(message, error.code, error.path, error.hint, correlation_id, report)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if isinstance(error, Unavailable):
        # Whole seconds are all that the header knows.
        headers = ((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))),)
    if isinstance(error, MethodNotAllowed):
        headers = ((b"allow", ", ".join(error.methods).encode()),)
    if isinstance(error, Unauthenticated):
        headers = ((b"www-authenticate", b'Bearer realm="parbake"'),)
    return status_of(type(error)), msgspec.json.encode(body), headers
