"""The environment lock: what differs, and what of it the bundle's own code depends on."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import msgspec
from msgspec.structs import replace

from parbake.contract.environment import Distributions, capture, differences
from parbake.contract.model import Contract, Environment, Library, Step, TensorSpec

HERE = Environment(
    "3.11.7", "CPython", "Linux 6.1", "x86_64", (Library("numpy", "2.1.0"), Library("rich", "14.0"))
)


def test_the_lock_names_this_python_and_every_library() -> None:
    lock = capture(("NumPy", "scikit_learn"))
    versions = {library.name: library.version for library in lock.libraries}
    assert lock.python == platform.python_version()
    assert {"numpy", "onnxruntime", "msgspec"} <= set(versions)
    assert lock.required == ("numpy", "scikit-learn")
    assert differences(lock, capture()) == []


def test_a_library_that_only_this_machine_has_does_not_count() -> None:
    assert differences(HERE, replace(HERE, libraries=(*HERE.libraries, Library("torch", "2.9")))) == []


def test_required_libraries_come_first_and_are_marked() -> None:
    here = replace(HERE, libraries=(Library("numpy", "2.4.0"),), system="Linux 6.9")
    found = differences(replace(HERE, required=("numpy",)), here)
    assert [(d.name, d.packed, d.here, d.required) for d in found] == [
        ("numpy", "2.1.0", "2.4.0", True),
        ("rich", "14.0", "not installed", False),
        ("system", "Linux 6.1", "Linux 6.9", False),
    ]


def test_another_minor_python_matters_to_own_code_only() -> None:
    other = replace(HERE, python="3.12.0")
    assert [d.required for d in differences(HERE, other)] == [False]
    assert [d.required for d in differences(replace(HERE, required=("numpy",)), other)] == [True]
    patch = replace(HERE, python="3.11.9", required=("numpy",))
    assert [d.required for d in differences(patch, HERE)] == [False]


def test_a_module_is_traced_to_its_distribution() -> None:
    found = Distributions()
    assert found.of("google.protobuf") == found.of("google.protobuf.message") == "protobuf"
    assert found.of("numpy.linalg") == "numpy"
    assert found.of("json") is None


def test_a_shared_namespace_belongs_to_nobody_whoever_comes_first_on_the_path(tmp_path: Path) -> None:
    records = {
        "first": ["shared/one/__init__.py", "shared/one/deep/__init__.py", "shared/deeper/a/x.py"],
        "second": ["shared/two.py", "shared/deeper/b.cpython-311-x86_64-linux-gnu.so", "shared/notes.txt"],
        "Third_Of": ["alone/__init__.py", "both/__init__.py"],
        "fourth": ["both/__init__.py"],
    }
    folders = []
    for name, files in records.items():
        folders.append(tmp_path / name)
        info = tmp_path / name / f"{name}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))
    for order in (folders, folders[::-1]):
        found = Distributions([str(folder) for folder in order])
        assert {module: found.of(module) for module in (
            "shared", "shared.deeper", "shared.notes", "shared.one", "shared.one.deep.er", "shared.two",
            "shared.deeper.a.x", "shared.deeper.b", "alone.any", "both", "absent",
        )} == {
            "shared": None, "shared.deeper": None, "shared.notes": None, "shared.one": "first",
            "shared.one.deep.er": "first", "shared.two": "second", "shared.deeper.a.x": "first",
            "shared.deeper.b": "second", "alone.any": "third-of", "both": "fourth", "absent": None,
        }  # fmt: skip


def test_who_does_not_say_which_files_he_has_stands_for_what_nobody_else_brings(tmp_path: Path) -> None:
    for name in ("told", "untold"):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "top_level.txt").write_text("shared\n")
    (tmp_path / "told-1.dist-info" / "RECORD").write_text("shared/one/__init__.py,sha256=x,1\n")
    found = Distributions([str(tmp_path)])
    assert (found.of("shared.one.deep"), found.of("shared.other")) == ("told", "untold")


def test_the_lock_names_the_machine() -> None:
    lock = capture()
    assert lock.os
    assert isinstance(lock.cpu, str)
    found = {d.name: (d.packed, d.here, d.required) for d in differences(replace(lock, os="debian 1"), lock)}
    assert found == {"os": ("debian 1", lock.os, False)}


def test_a_lock_from_before_the_machine_was_kept_is_read_and_differs_in_nothing() -> None:
    raw = msgspec.to_builtins(capture())
    for name in ("os", "cpu", "gpus"):
        del raw[name]
    old = msgspec.json.decode(json.dumps(raw), type=Environment)
    assert (old.os, old.cpu, old.gpus) == ("", "", ())
    assert differences(old, capture()) == []


def test_a_contract_without_training_data_and_run_is_written_as_before() -> None:
    contract = Contract(
        "f", (TensorSpec("x", "FP64"),), (TensorSpec("y", "FP64"),), (Step("onnx", "m.onnx"),), "p", "o"
    )
    assert set(json.loads(msgspec.json.encode(contract))) == {
        "name", "inputs", "outputs", "steps", "purpose", "owner",
    }  # fmt: skip
    assert b'"run":"7"' in msgspec.json.encode(replace(contract, run="7"))
