"""onnxruntime, with its telemetry off: a model is nobody else's business, and a home may be missing or read-only."""

from __future__ import annotations

import os
from typing import Any, Final

SWITCH: Final = "ORT_DISABLE_TELEMETRY"


def onnxruntime() -> Any:
    """The module, for whoever uses it: nobody here imports it otherwise.

    From version 1.31 on it keeps a database and an identifier below the home directory from its import on, and sends
    what it notes to Microsoft. The switch counts only when it is set before. Who has set it to 0 keeps that.
    """
    os.environ.setdefault(SWITCH, "1")
    import onnxruntime as module

    return module
