"""What must hold before a version takes traffic: named checks, each with a verdict, evidence and perhaps a waiver."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec
from msgspec import Struct

from parbake.contract.model import Contract, Environment
from parbake.errors import SettingsError
from parbake.release import callers, rules
from parbake.release.rules import Comparison, Rule

Outcome = Literal["passed", "failed", "waived", "unknown"]

CHECKS: Final = (
    "digest",
    "signature",
    "metadata",
    "environment",
    "schema",
    "goldens",
    "latency",
    "memory",
    "table",
)
"""All there are, in the order in which they are shown."""

_NEVER_WAIVED: Final = "digest"
_SHOWN: Final = 6


class Waiver(Struct, frozen=True):
    """Somebody's word that a version may go live though a check did not pass."""

    check: str
    who: str
    why: str
    at: str
    """When, in UTC."""


class Finding(Struct, frozen=True):
    """One line of evidence: what was expected and what was found. ``ok`` is None where that is not judged."""

    what: str
    expected: str
    found: str
    ok: bool | None
    note: str = ""


class Check(Struct, frozen=True):
    """One check. ``words`` is the verdict in a line, ``evidence`` what it rests on."""

    name: str
    verdict: Outcome
    words: str
    evidence: tuple[Finding, ...] = ()
    hint: str = ""
    waiver: Waiver | None = None


class GateReport(Struct, frozen=True):
    """What the gate found of one bundle on one machine. ``ok`` says whether it may take traffic."""

    bundle: str
    name: str
    digest: str
    against: str
    """Digest of the version that it would replace, or ""."""
    at: str
    checks: tuple[Check, ...]
    ok: bool

    def check(self, name: str) -> Check | None:
        """The check of that name."""
        return next((check for check in self.checks if check.name == name), None)

    @property
    def refused(self) -> tuple[Check, ...]:
        """Those that neither passed nor were waived."""
        return tuple(check for check in self.checks if check.verdict in ("failed", "unknown"))

    @property
    def never_waived(self) -> bool:
        """Whether something did not pass that cannot be let pass."""
        return any(check.name == _NEVER_WAIVED for check in self.refused)

    @property
    def waivers(self) -> tuple[Waiver, ...]:
        """Those that were needed."""
        return tuple(check.waiver for check in self.checks if check.waiver is not None)


class Measured(Struct, frozen=True):
    """One row at a time through the model in a process of its own, on this machine."""

    calls: int
    p50_ms: float
    p99_ms: float
    bytes: int
    """Memory that the process held at most."""
    idle_bytes: int = 0
    """Memory of such a process before it has a model."""


class Replayed(Struct, frozen=True):
    """The goldens, answered here."""

    rows: int
    differing: int
    largest: float
    """Largest difference of a floating-point output."""
    rtol: float
    atol: float
    evidence: tuple[Finding, ...] = ()
    """The first rows that differ."""


class Baked(Struct, frozen=True):
    """The prediction table that would be served with the version."""

    path: str
    rows: int
    bundle_digest: str
    error: str = ""
    """Why it cannot be used, in words."""
    hint: str = ""


def make_waiver(check: str, who: str, why: str, at: datetime | None = None) -> Waiver:
    """A waiver. Raises `SettingsError` for a check that there is not, or where who or why is missing."""
    if check not in CHECKS:
        raise SettingsError(
            f"there is no check {check[:80]!r} to waive", hint=f"checks are {', '.join(CHECKS)}"
        )
    if check == _NEVER_WAIVED:
        raise SettingsError(
            "the digest cannot be waived: what is not what was packed has no name to go live under",
            hint="pack again, or copy the bundle again",
        )
    if not why.strip():
        raise SettingsError(
            f"the waiver of {check} has no reason", hint="--why 'what makes it right this once'"
        )
    if not who.strip():
        raise SettingsError(f"the waiver of {check} has no name under it", hint="--who NAME")
    return Waiver(check, who.strip(), why.strip(), (at or datetime.now(UTC)).isoformat(timespec="seconds"))


def environment_check(
    contract: Contract, packed: Environment, here: Environment, asked: dict[str, Rule] | None = None
) -> Check:
    """The environment lock against what is installed here."""
    found = rules.compare(contract, packed, here, asked)
    verdict = rules.verdict(found)
    evidence = tuple(_of_library(one) for one in found)
    broken = [one for one in found if one.ok is False]
    if broken:
        words = "; ".join(f"{one.name} {one.packed}, here {one.here} ({one.rule})" for one in broken[:_SHOWN])
        return Check(
            "environment", "failed", words, evidence,
            "install these versions, pack again here, or --rule NAME=compatible where that is enough",
        )  # fmt: skip
    if verdict is None:
        words = ", ".join(one.name for one in found if one.ok is None)
        return Check("environment", "unknown", f"versions not known: {words}", evidence)
    ruled = sum(one.rule != "any" for one in found)
    free = sum(one.packed != one.here for one in found if one.rule == "any")
    return Check(
        "environment", "passed", f"{ruled} with a rule as they must be, {free} others differ", evidence
    )


def schema_check(new: Contract, old: Contract | None, *, allowed: bool = False) -> Check:
    """The contract against that of the version it replaces; ``allowed`` lets breaking changes pass."""
    if old is None:
        return Check("schema", "passed", "replaces no version")
    found = callers.changes(old, new)
    broken = callers.breaking(found)
    evidence = tuple(Finding(c.where, c.before, c.after, not c.breaking, c.why) for c in found)
    if not broken:
        many = "" if len(found) == 1 else "s"
        words = f"{len(found)} change{many}, none breaks a caller" if found else "the same for callers"
        return Check("schema", "passed", words, evidence)
    words = "; ".join(f"{c.where}: {c.before} -> {c.after}" for c in broken[:_SHOWN])
    if allowed:
        return Check("schema", "passed", f"breaks callers, as allowed: {words}", evidence)
    return Check(
        "schema", "failed", f"breaks callers: {words}", evidence,
        "give it a new name, so that callers change over when they can; or --breaking",
    )  # fmt: skip


def golden_check(found: Replayed | None, why: str = "", hint: str = "") -> Check:
    """The goldens replayed here; ``why`` says what stopped it."""
    if found is None:
        return Check("goldens", "failed" if why else "unknown", why or "not replayed", hint=hint)
    if not found.rows:
        return Check("goldens", "failed", "the bundle has none", hint="pack it with an example")
    tolerance = (
        "exactly" if found.rtol == found.atol == 0 else f"within {found.atol:g} + {found.rtol:g} x |expected|"
    )
    if found.differing:
        return Check(
            "goldens", "failed", f"{found.differing} of {found.rows} rows differ, by up to {found.largest:g}",
            found.evidence, "parbake check BUNDLE says what differs between this machine and the one that packed",
        )  # fmt: skip
    return Check(
        "goldens", "passed", f"{found.rows} rows answered {tolerance}, largest difference {found.largest:g}"
    )


def latency_check(found: Measured | None, deadline_ms: float | None) -> Check:
    """One row within the deadline, 99 times of 100."""
    if found is None:
        return Check("latency", "unknown", "not measured, as the model did not run")
    limit = "no limit" if deadline_ms is None else f"{deadline_ms:g} ms"
    within = None if deadline_ms is None else found.p99_ms <= deadline_ms
    evidence = (
        Finding("p50 of one row", "-", f"{found.p50_ms:.3g} ms", None, f"{found.calls} calls"),
        Finding("p99 of one row", limit, f"{found.p99_ms:.3g} ms", within, f"{found.calls} calls"),
    )
    words = f"p99 {found.p99_ms:.3g} ms for one row, limit {limit}"
    if within is False:
        return Check(
            "latency",
            "failed",
            words,
            evidence,
            "a larger --deadline-ms, a smaller model, or parbake advise BUNDLE",
        )
    return Check("latency", "passed", words, evidence)


def memory_check(found: Measured | None, max_bytes: int | None) -> Check:
    """The process with the model within what the deployment may take."""
    if found is None or not found.bytes:
        return Check("memory", "unknown", "not measured, as the model did not run")
    limit = "no limit" if max_bytes is None else _size(max_bytes)
    within = None if max_bytes is None else found.bytes <= max_bytes
    note = f"{_size(found.idle_bytes)} before the model" if found.idle_bytes else ""
    evidence = (Finding("memory of a runner", limit, _size(found.bytes), within, note),)
    words = f"{_size(found.bytes)} at most, limit {limit}"
    if within is False:
        return Check("memory", "failed", words, evidence, "a larger --max-bytes, or a smaller model")
    return Check("memory", "passed", words, evidence)


def table_check(digest: str, found: Baked | None, *, needed: bool = False) -> Check:
    """The table, baked by this bundle; ``needed`` where the deployment answers from one."""
    hint = "parbake bake BUNDLE --input FILE --out TABLE, then --table TABLE"
    if found is None:
        if needed:
            return Check(
                "table", "failed", "the deployment answers from a table, and none is baked", hint=hint
            )
        return Check("table", "passed", "answers from no table")
    if found.error:
        return Check("table", "failed", found.error, hint=found.hint or hint)
    evidence = (
        Finding("baked by", digest, found.bundle_digest, digest == found.bundle_digest),
        Finding("rows", "at least 1", f"{found.rows:,}", found.rows > 0),
    )
    if digest != found.bundle_digest:
        return Check(
            "table", "failed", f"baked by {found.bundle_digest[:19]}..., another bundle", evidence, hint
        )
    if not found.rows:
        return Check("table", "failed", "the table is empty", evidence, hint)
    return Check("table", "passed", f"{found.rows:,} rows, baked by this bundle", evidence)


def metadata_check(contract: Contract) -> Check:
    """Whether somebody answers for the model, and says what it is for."""
    missing = [what for what in ("purpose", "owner") if not getattr(contract, what).strip()]
    evidence = tuple(
        Finding(what, "said", getattr(contract, what).strip() or "-", what not in missing)
        for what in ("purpose", "owner")
    )
    if missing:
        return Check(
            "metadata",
            "failed",
            f"no {' and no '.join(missing)}",
            evidence,
            "pack again with --purpose and --owner",
        )
    return Check("metadata", "passed", f"{contract.purpose}; {contract.owner} answers for it", evidence)


def report(
    bundle: str,
    contract: Contract | None,
    digest: str,
    against: str,
    checks: Sequence[Check],
    waivers: Sequence[Waiver] = (),
) -> GateReport:
    """The verdict over all checks, in their order, each waiver taken where it was needed."""
    by_name = {waiver.check: waiver for waiver in waivers}
    found: list[Check] = []
    for check in sorted(checks, key=lambda check: CHECKS.index(check.name)):
        if check.verdict in ("failed", "unknown") and check.name in by_name:
            check = msgspec.structs.replace(check, verdict="waived", waiver=by_name[check.name])
        found.append(check)
    ok = all(check.verdict in ("passed", "waived") for check in found)
    name = contract.name if contract is not None else ""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return GateReport(bundle, name, digest, against, at, tuple(found), ok)


def _of_library(one: Comparison) -> Finding:
    note = f"{one.rule}: {one.why}" if one.why else one.rule
    return Finding(one.name, one.packed or "-", one.here, one.ok, note)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
