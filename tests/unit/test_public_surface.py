"""The public surface: small, documented, and imported only when it is used."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import parbake
import parbake.testing

PUBLIC = {"Bundle", "ParbakeError", "__version__", "load", "pack", "serve"}
FOR_TESTS = {"MemoryTable", "Server", "serving"}


def test_the_public_names_are_these() -> None:
    # Whoever adds a name here promises to keep it.
    assert set(parbake.__all__) == PUBLIC
    assert set(dir(parbake)) >= PUBLIC
    assert set(parbake.testing.__all__) == FOR_TESTS


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"} | FOR_TESTS))
def test_every_public_name_is_documented(name: str) -> None:
    item = getattr(parbake.testing if name in FOR_TESTS else parbake, name)
    assert inspect.getdoc(item)
    if inspect.isfunction(item):
        signature = inspect.signature(item)
        assert signature.return_annotation is not inspect.Signature.empty
    for member, value in vars(item).items() if inspect.isclass(item) else ():
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


def test_pack_explains_every_argument() -> None:
    doc = inspect.getdoc(parbake.pack)
    assert doc is not None
    for argument in inspect.signature(parbake.pack).parameters:
        assert f"\n    {argument}: " in doc


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'bake_everything'"):
        importlib.import_module("parbake").bake_everything  # noqa: B018  the access is what is tested


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, parbake; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"numpy", "onnx", "onnxruntime", "pyarrow", "click", "msgspec", "asyncio"}
