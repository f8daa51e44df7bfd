"""Frameworks train in one thread here: on a busy machine their threads wait for each other."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Limit OpenMP and BLAS, where the library that can do so is installed (scikit-learn brings it)."""
    if importlib.util.find_spec("threadpoolctl") is None:
        yield
        return
    threadpoolctl = importlib.import_module("threadpoolctl")
    importlib.import_module("sklearn.ensemble")
    with threadpoolctl.threadpool_limits(limits=1):
        yield
