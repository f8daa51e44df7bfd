"""What callers are told of failures that are not theirs: a number to ask for, while the log has the rest."""

from __future__ import annotations

import secrets

from parbake.errors import ModelFailed, ParbakeError
from parbake.logs import log


def shown(error: ParbakeError, deployment: str) -> tuple[ParbakeError, str]:
    """The error as a caller may see it, and its correlation id ("" where the caller may see all of it)."""
    if not isinstance(error, ModelFailed):
        return error, ""
    number = secrets.token_hex(6)
    log().error("model.failed", deployment=deployment, error=error.message, correlation_id=number)
    return ModelFailed(
        f"model {deployment!r} failed on this input",
        hint=f"the log of the server says why, under correlation id {number}",
    ), number


def unexpected(asked: str) -> tuple[ParbakeError, str]:
    """A bug of ours: logs the traceback, and gives what the caller may see. Call it in an except block."""
    number = secrets.token_hex(6)
    log().exception("request.failed", path=asked, correlation_id=number)
    error = ParbakeError(
        "an error of the server", hint=f"the log of the server says why, under correlation id {number}"
    )
    return error, number
