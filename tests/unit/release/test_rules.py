"""The rules for libraries: what is exact, what is compatible, and what cannot be told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from parbake.contract.model import Contract, Environment, Library, Parity, Step, TensorSpec
from parbake.errors import SettingsError
from parbake.release.rules import RULES, Rule, compare, compatible, read_rules, verdict

VERSIONS = st.builds(
    lambda major, minor, patch: f"{major}.{minor}.{patch}",
    st.integers(0, 3), st.integers(0, 3), st.integers(0, 3),
)  # fmt: skip
NAMES = st.sampled_from(["numpy", "scikit-learn", "onnxruntime", "pandas", "scipy", "left-pad"])
LOCKS = st.dictionaries(NAMES, VERSIONS, max_size=5)


def lock(libraries: dict[str, str], python: str = "3.11.7", required: tuple[str, ...] = ()) -> Environment:
    found = tuple(Library(name, version) for name, version in sorted(libraries.items()))
    return Environment(python, "CPython", "Linux 6.1", "x86_64", found, required)


def contract(framework: str = "scikit-learn", kind: str = "onnx") -> Contract:
    step = Step("onnx", "m.onnx") if kind == "onnx" else Step("python", "source", "f:f")
    return Contract(
        "eta", (TensorSpec("x", "FP32"),), (TensorSpec("y", "FP32"),), (step,), "p", "o",
        parity=Parity(framework, "1.5.0", 1, 0, exact=True, max_abs_diff=0.0),
    )  # fmt: skip


@given(LOCKS, st.sampled_from(["onnx", "python"]), st.lists(NAMES, max_size=2))
def test_an_environment_runs_what_was_packed_in_it(
    libraries: dict[str, str], kind: str, needed: list[str]
) -> None:
    here = lock(libraries, required=tuple(name for name in needed if name in libraries))
    assert verdict(compare(contract(kind=kind), here, here)) is True


@given(LOCKS, LOCKS, st.sampled_from(RULES), NAMES)
def test_a_stricter_rule_never_lets_more_pass(
    packed: dict[str, str], there: dict[str, str], rule: Rule, name: str
) -> None:
    order: dict[bool | None, int] = {False: 0, None: 1, True: 2}
    stricter = RULES[max(RULES.index(rule) - 1, 0)]
    loose, strict = (
        order[verdict(compare(contract(), lock(packed), lock(there), {name: one}))]
        for one in (rule, stricter)
    )
    assert strict <= loose


@given(VERSIONS, VERSIONS, VERSIONS)
def test_compatible_is_an_equivalence(left: str, middle: str, right: str) -> None:
    assert compatible(left, left)
    assert compatible(left, right) == compatible(right, left)
    if compatible(left, middle) and compatible(middle, right):
        assert compatible(left, right)


@pytest.mark.parametrize(
    ("left", "right", "name", "expected"),
    [
        ("1.5.2", "1.7.0", "", True),
        ("1.5.2", "2.0.0", "", False),
        ("0.5.2", "0.5.9", "", True),
        ("0.5.2", "0.6.0", "", False),
        ("3.11.7", "3.11.9", "python", True),
        ("3.11.7", "3.12.0", "python", False),
        ("1.0", "1.0.0rc1", "", True),
        ("not a version", "not a version", "", True),
        ("not a version", "1.0", "", False),
        ("1" * 5000, "1.0", "", False),
    ],
)
def test_what_is_compatible(left: str, right: str, name: str, expected: bool) -> None:
    assert compatible(left, right, name) is expected


def test_framework_and_runtime_are_exact_without_being_asked() -> None:
    packed = lock({"onnxruntime": "1.22.0", "scikit-learn": "1.5.0", "pandas": "2.0.0"})
    here = lock({"onnxruntime": "1.22.1", "scikit-learn": "1.6.0", "pandas": "1.0.0"}, python="3.13.0")
    found = {one.name: (one.rule, one.ok) for one in compare(contract(), packed, here)}
    assert found == {
        "onnxruntime": ("exact", False),
        "scikit-learn": ("exact", False),
        "pandas": ("any", True),
        "python": ("any", True),
    }
    allowed = compare(contract(), packed, here, {"onnxruntime": "compatible", "scikit-learn": "compatible"})
    assert verdict(allowed) is True


def test_a_framework_that_a_converted_model_does_not_need_may_be_missing() -> None:
    packed = lock({"onnxruntime": "1.22.0", "scikit-learn": "1.5.0"})
    assert verdict(compare(contract(), packed, lock({"onnxruntime": "1.22.0"}))) is True
    needed = replace(packed, required=("scikit-learn",))
    assert verdict(compare(contract(), needed, lock({"onnxruntime": "1.22.0"}))) is False


def test_the_runtime_may_not_be_missing_and_another_build_of_it_will_do() -> None:
    packed = lock({"onnxruntime": "1.22.0"})
    assert verdict(compare(contract(), packed, lock({}))) is False
    assert verdict(compare(contract(), packed, lock({"onnxruntime-gpu": "1.22.0"}))) is True


def test_a_version_that_is_not_known_is_not_taken_for_right() -> None:
    packed = lock({"onnxruntime": "1.22.0"})
    assert verdict(compare(contract(), packed, lock({"onnxruntime": ""}))) is None
    code = contract("python", "python")
    assert verdict(compare(code, packed, lock({"onnxruntime": "1.22.0"}, python=""))) is None
    assert verdict(compare(code, packed, lock({"onnxruntime": "1.22.0"}, python="3.12.1"))) is False
    assert verdict(compare(code, packed, lock({"onnxruntime": "1.22.0"}, python="3.11.0"))) is True


def test_another_build_of_a_needed_library_is_held_to_its_version() -> None:
    packed = lock({"xgboost-cpu": "3.0.0"}, required=("xgboost-cpu",))
    code = contract("python", "python")
    assert verdict(compare(code, packed, lock({"xgboost": "3.0.0"}))) is True
    assert verdict(compare(code, packed, lock({"xgboost": "3.0.1"}))) is False
    assert (
        verdict(compare(code, packed, lock({"xgboost": "3.0.1"}), read_rules({"xgboost-cpu": "compatible"})))
        is True
    )


def test_a_needed_library_that_the_lock_does_not_have_is_not_taken_for_right() -> None:
    packed = lock({}, required=("numpy",))
    assert verdict(compare(contract("python", "python"), packed, lock({"numpy": "2.0.0"}))) is None


def test_a_rule_that_there_is_not_is_refused() -> None:
    assert read_rules({"Scikit_Learn": "any"}) == {"scikit-learn": "any"}
    with pytest.raises(SettingsError, match="'newer' is no rule for numpy"):
        read_rules({"numpy": "newer"})
