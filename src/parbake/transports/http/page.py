"""The page on which people try the models, as it lies in the package."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def page() -> bytes:
    """The page: one HTML file that needs no other."""
    return (files("parbake") / "web" / "page.html").read_bytes()
