"""Errors as gRPC: one status code for each class of `parbake.errors`, the rest as trailing metadata."""

from __future__ import annotations

import math
from typing import Final

import grpc

from parbake import errors
from parbake.errors import ParbakeError, Unavailable

STATUSES: Final[dict[type[ParbakeError], grpc.StatusCode]] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    # As gRPC itself says of a message that is too large.
    errors.RequestTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    errors.Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.RouteNotFound: grpc.StatusCode.UNIMPLEMENTED,
    errors.MethodNotAllowed: grpc.StatusCode.UNIMPLEMENTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ModelFailed: grpc.StatusCode.INTERNAL,
    errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TableError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RegisterRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PackRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InputFileError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SettingsError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MissingExtra: grpc.StatusCode.UNIMPLEMENTED,
    errors.MissingProgram: grpc.StatusCode.UNIMPLEMENTED,
    errors.BuildFailed: grpc.StatusCode.INTERNAL,
    errors.ServerNotFound: grpc.StatusCode.UNAVAILABLE,
    errors.ParbakeError: grpc.StatusCode.INTERNAL,
}
"""A class without a line of its own has that of its nearest ancestor."""

_MAX_DETAILS: Final = 4000
"""Characters: clients take only a few kilobytes of metadata."""


def status_of(kind: type[ParbakeError]) -> grpc.StatusCode:
    """The gRPC status of a class of errors."""
    return next(STATUSES[ancestor] for ancestor in kind.__mro__ if ancestor in STATUSES)


def details_of(error: ParbakeError) -> str:
    """What went wrong, where, and what to do, as one text."""
    text = str(error)
    return text if len(text) <= _MAX_DETAILS else text[: _MAX_DETAILS - 3] + "..."


def trailers_of(error: ParbakeError, correlation_id: str = "") -> tuple[tuple[str, str], ...]:
    """Trailing metadata: the error's code, and when to come again or what to ask for."""
    trailers = [("parbake-code", error.code)]
    if isinstance(error, Unavailable):
        # Whole seconds, as in HTTP.
        trailers.append(("retry-after", str(max(1, math.ceil(error.retry_after_s)))))
    if correlation_id:
        trailers.append(("parbake-correlation-id", correlation_id))
    return tuple(trailers)
