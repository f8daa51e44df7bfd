"""Hold the environment that a bundle was packed in against another one, by a rule for each library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from msgspec import Struct
from packaging.version import Version

from parbake.contract.model import Contract, Environment
from parbake.errors import SettingsError

Rule = Literal["exact", "compatible", "any"]
RULES: Final[tuple[Rule, ...]] = ("exact", "compatible", "any")

ABSENT: Final = "not installed"
NOT_KNOWN: Final = "not known"
PYTHON: Final = "python"
RUNTIME: Final = "onnxruntime"

# Frameworks as `Parity` and their distributions have them. Of others, the bundle is the source, or its code.
_FRAMEWORKS: Final = frozenset(("scikit-learn", "lightgbm", "xgboost", "torch"))

# Distributions that bring the same library, built for other machines.
_SAME: Final = {
    "xgboost-cpu": "xgboost",
    "onnxruntime-gpu": "onnxruntime",
    "lightgbm-cpu": "lightgbm",
}


class Comparison(Struct, frozen=True):
    """One library, as packed and as it is elsewhere. ``ok`` is None where that cannot be told."""

    name: str
    packed: str
    here: str
    rule: Rule
    ok: bool | None
    why: str = ""
    """Why the rule is not the one of most libraries: framework, runtime, own code."""


def read_rules(words: Mapping[str, str]) -> dict[str, Rule]:
    """Rules by canonical library name. Raises `SettingsError` for a rule that there is not."""
    found: dict[str, Rule] = {}
    for name, word in words.items():
        rule = next((rule for rule in RULES if rule == word), None)
        if rule is None:
            raise SettingsError(f"{word!r} is no rule for {name}", hint=f"one of {', '.join(RULES)}")
        found[_library(name)] = rule
    return found


def framework_library(contract: Contract) -> str:
    """The distribution of the framework that made the model; "" where it was none, or the runtime itself."""
    if contract.parity is None or contract.parity.framework not in _FRAMEWORKS:
        return ""
    return contract.parity.framework


def defaults(contract: Contract, packed: Environment) -> dict[str, tuple[Rule, str]]:
    """The rule of each library that has one, and why; of all others any version will do.

    Exact are the framework that made the model, the runtime, and what the bundle's own code imports. Python must
    be of the same minor version where the bundle has code.
    """
    found: dict[str, tuple[Rule, str]] = {}
    code = bool(packed.required) or contract.own_code
    if code:
        found[PYTHON] = ("compatible", "the bundle has code of its own")
    if any(step.kind == "onnx" for step in contract.steps):
        found[RUNTIME] = ("exact", "it runs the model")
    if framework := framework_library(contract):
        found[framework] = ("exact", "it made the model")
    for name in packed.required:
        found[_library(name)] = ("exact", "the bundle's code needs it")
    return found


def compare(
    contract: Contract, packed: Environment, here: Environment, rules: Mapping[str, Rule] | None = None
) -> tuple[Comparison, ...]:
    """Every library that has a rule or a difference; what breaks a rule first.

    ``rules`` overrule `defaults`. A framework whose model was converted, so that the bundle does not need it, may be
    missing. A version of ``here`` that is empty is not known.
    """
    standing = defaults(contract, packed)
    for name, rule in (rules or {}).items():
        standing[name] = (rule, "asked for")
    needed = {_library(name) for name in packed.required}
    before = _versions(packed)
    if (framework := framework_library(contract)) and contract.parity is not None:
        before.setdefault(framework, contract.parity.framework_version)
    after = _versions(here)
    found: list[Comparison] = []
    for name in dict.fromkeys((PYTHON, *standing, *before)):
        if name not in before and name not in needed:
            # A rule for something that the lock does not have.
            continue
        rule, why = standing.get(name, ("any", ""))
        was = before.get(name, "")
        now = after.get(name, ABSENT) or NOT_KNOWN
        if name not in standing and was == now:
            continue
        spare = now == ABSENT and name not in needed and name not in (RUNTIME, PYTHON)
        ok = True if spare else _holds(rule, was, now, name)
        if spare and rule != "any":
            why = f"{why}, and runs nothing here"
        found.append(Comparison(name, was, now, rule, ok, why))
    return tuple(sorted(found, key=lambda one: (one.ok is True, one.rule == "any", one.name)))


def verdict(comparisons: tuple[Comparison, ...]) -> bool | None:
    """Whether all rules hold; None where one that might not cannot be told."""
    if any(one.ok is False for one in comparisons):
        return False
    return None if any(one.ok is None for one in comparisons) else True


def compatible(left: str, right: str, name: str = "") -> bool:
    """Whether two versions are of one series: the same major one; below 1.0, and of Python, the same minor one."""
    try:
        return _series(left, name) == _series(right, name)
    except ValueError:
        # InvalidVersion is one, and so is a number with more digits than Python reads.
        return left == right


def _holds(rule: Rule, packed: str, here: str, name: str) -> bool | None:
    if rule == "any":
        return True
    if here == ABSENT:
        return False
    if here == NOT_KNOWN or not packed:
        return None
    return packed == here if rule == "exact" else compatible(packed, here, name)


def _series(text: str, name: str) -> tuple[int, ...]:
    version = Version(text)
    if name == PYTHON or version.major == 0:
        return version.epoch, version.major, version.minor
    return version.epoch, version.major


def _versions(environment: Environment) -> dict[str, str]:
    found = {PYTHON: environment.python}
    for library in environment.libraries:
        found.setdefault(_library(library.name), library.version)
    return found


def _library(name: str) -> str:
    """The name under which a library is compared, whatever build of it is installed."""
    plain = name.lower().replace("_", "-").replace(".", "-")
    return _SAME.get(plain, plain)
