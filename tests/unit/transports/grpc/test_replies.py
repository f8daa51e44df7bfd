"""Errors as gRPC: every class has a status, and the caller is told when to come again."""

from __future__ import annotations

import inspect

import grpc
import pytest

from parbake import errors
from parbake.errors import InvalidInput, Overloaded, ParbakeError, RunnerDown
from parbake.transports.grpc.replies import STATUSES, details_of, status_of, trailers_of
from parbake.transports.http.replies import status_of as http_status_of

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ParbakeError)]

# What a gateway between the two would make of a status (google.rpc.Code), widened to the statuses that we tell apart.
HTTP = {
    grpc.StatusCode.INVALID_ARGUMENT: {400, 422},
    grpc.StatusCode.RESOURCE_EXHAUSTED: {413, 429},
    grpc.StatusCode.UNAUTHENTICATED: {401},
    grpc.StatusCode.PERMISSION_DENIED: {403},
    grpc.StatusCode.FAILED_PRECONDITION: {409, 422},
    grpc.StatusCode.NOT_FOUND: {404},
    grpc.StatusCode.UNIMPLEMENTED: {404, 405, 501},
    grpc.StatusCode.UNAVAILABLE: {502, 503},
    grpc.StatusCode.DEADLINE_EXCEEDED: {504},
    grpc.StatusCode.INTERNAL: {500},
}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_a_status_that_agrees_with_http(kind: type[ParbakeError]) -> None:
    assert http_status_of(kind) in HTTP[status_of(kind)]


def test_the_table_names_only_classes_of_the_tree() -> None:
    assert set(STATUSES) <= set(CLASSES)


def test_a_class_that_the_table_does_not_know_has_the_status_of_its_parent() -> None:
    class Stalled(RunnerDown):
        """A runner that does not answer."""

    assert status_of(Stalled) is grpc.StatusCode.UNAVAILABLE


def test_the_text_says_what_where_and_what_to_do() -> None:
    error = InvalidInput("expected FP32", path="$.inputs[0].datatype", hint="send it as FP32")
    assert details_of(error) == "expected FP32 at $.inputs[0].datatype\nhint: send it as FP32"
    assert len(details_of(InvalidInput("x" * 100_000))) == 4000


def test_the_trailers_say_which_error_and_when_to_come_again() -> None:
    assert trailers_of(Overloaded("full", retry_after_s=1.2)) == (
        ("parbake-code", "overloaded"),
        ("retry-after", "2"),
    )
    assert trailers_of(InvalidInput("no"), "abc") == (
        ("parbake-code", "invalid_input"),
        ("parbake-correlation-id", "abc"),
    )
