"""Serve machine-learning predictions from a table, by the model, or by both, from one contract.

::

    bundle = parbake.pack(model, name="eta", example=X, purpose="...", owner="...")
    bundle.predict(X[:3])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parbake.errors import ParbakeError

if TYPE_CHECKING:
    from parbake.app.local import Bundle, load
    from parbake.app.pack import pack
    from parbake.transports.server import serve

__all__ = ["Bundle", "ParbakeError", "__version__", "load", "pack", "serve"]

_LAZY = {
    "Bundle": "parbake.app.local",
    "load": "parbake.app.local",
    "pack": "parbake.app.pack",
    "serve": "parbake.transports.server",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: ``import parbake`` alone imports nothing heavy."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("parbake")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'parbake' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
