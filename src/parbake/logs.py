"""Logs are events with fields: readable on a terminal, JSON otherwise, always on stderr.

The library behind it takes longer to import than a model to load, so that it is imported with the first line
that a process logs. A process is told the form by ``PARBAKE_LOG_FORMAT``, which its children inherit.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

FORMAT_VARIABLE = "PARBAKE_LOG_FORMAT"


def log() -> FilteringBoundLogger:
    """The logger of this process: ``log().info("table.swapped", deployment="eta", rows=7)``."""
    return _logger()


class _Stderr:
    """Whatever is the standard error now: it may be another file than when the first line was logged."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@cache
def _logger() -> FilteringBoundLogger:
    import structlog

    form = os.environ.get(FORMAT_VARIABLE, "auto")
    text = form == "text" or (form != "json" and sys.stderr.isatty())
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if text:
        processors.append(
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
        )
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(_Stderr()),  # type: ignore[arg-type]  # all of a file that it uses
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    return logger
