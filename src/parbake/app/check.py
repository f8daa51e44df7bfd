"""Verify a bundle on this machine: digest, environment, goldens. A bad bundle is reported, not raised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.contract.datatypes import FLOATS
from parbake.contract.environment import Difference, capture, differences
from parbake.contract.signatures import PublicKey, Signed, check_signed, look_at
from parbake.errors import BundleUnsigned, ParbakeError
from parbake.runtime.session import Session, differing_rows


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What checking a bundle found. `ok` is the verdict; what was not reached is None."""

    path: Path
    name: str = ""
    digest: str = ""
    digest_ok: bool = False
    """Whether every file is as the manifest says."""
    golden_rows: int | None = None
    differing_rows: int | None = None
    """Goldens that this machine answers otherwise than training did, beyond the tolerance."""
    max_abs_diff: float | None = None
    """Largest difference of a floating-point output on the goldens."""
    first_difference: str = ""
    """The first differing golden, in words."""
    differences: tuple[Difference, ...] = ()
    """What of the environment is not as it was; required libraries first."""
    signatures: tuple[Signed, ...] = ()
    """Who signed the bundle."""
    trusted: bool | None = None
    """Whether one of those who are trusted has; None where nobody asked."""
    error: str = ""
    """Why the check went no further, in one line."""
    hint: str = ""

    @property
    def environment_ok(self) -> bool:
        """Whether everything that the bundle's own code needs is as it was."""
        return not any(difference.required for difference in self.differences)

    @property
    def ok(self) -> bool:
        """Whether this machine may serve the bundle."""
        promises = self.digest_ok and self.environment_ok and self.trusted is not False
        return promises and not self.error and self.differing_rows == 0


def check(
    path: str | os.PathLike[str], *, allow_pickle: bool = False, trusted: Sequence[PublicKey] | None = None
) -> CheckReport:
    """Check the bundle at ``path``: its digest, the environment, and every golden. Never raises for a bad one.

    With ``trusted`` keys, nothing of a bundle that none of them has signed is run.
    """
    where = Path(path)
    try:
        stored = read_bundle(where)
    except ParbakeError as error:
        return CheckReport(where, error=_words(error), hint=error.hint)
    except OSError as error:
        return CheckReport(where, error=f"{where} cannot be read: {error.strerror}")
    signed = CheckReport(where, stored.contract.name, stored.digest, True)
    try:
        signed = replace(signed, signatures=look_at(stored, trusted or ()))
        if trusted is not None:
            check_signed(stored, trusted)
            signed = replace(signed, trusted=True)
    except BundleUnsigned as error:
        return replace(signed, trusted=False, error=_words(error), hint=error.hint)
    except ParbakeError as error:
        return replace(signed, error=_words(error), hint=error.hint)
    return replace(
        _promises(where, stored, allow_pickle), signatures=signed.signatures, trusted=signed.trusted
    )


def _promises(where: Path, stored: StoredBundle, allow_pickle: bool) -> CheckReport:
    """What a bundle whose digest is right keeps of its promises."""
    found = tuple(differences(stored.environment, capture()))
    name, digest = stored.contract.name, stored.digest
    try:
        rows, differing, gap, first = _goldens(stored, allow_pickle)
    except ParbakeError as error:
        return CheckReport(where, name, digest, True, differences=found, error=_words(error), hint=error.hint)
    except Exception as error:
        # Own code of a bundle may raise anything while it is imported.
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return CheckReport(where, name, digest, True, differences=found, error=said)
    return CheckReport(where, name, digest, True, rows, differing, gap, first, found)


def _goldens(stored: StoredBundle, allow_pickle: bool) -> tuple[int, int, float, str]:
    """Rows, differing rows, largest difference, and the first differing golden in words."""
    goldens = stored.goldens()
    if goldens.rows == 0:
        return 0, 0, 0.0, ""
    contract = stored.contract
    answers = Session(stored, allow_pickle=allow_pickle).run(goldens.inputs)
    bad: set[int] = set()
    gap = 0.0
    first = ""
    for spec in contract.outputs:
        got, expected = answers[spec.name], goldens.outputs[spec.name]
        rows = differing_rows(got, expected, spec, contract.tolerance.rtol, contract.tolerance.atol)
        bad.update(rows.tolist())
        if len(rows) and not first:
            row = int(rows[0])
            values = [np.array2string(np.asarray(a[row : row + 1]), threshold=8) for a in (expected, got)]
            first = f"row {row}, output {spec.name!r}: expected {values[0]}, got {values[1]}"
        if spec.datatype in FLOATS and got.shape == expected.shape:
            with np.errstate(all="ignore"):
                apart = np.abs(got.astype(np.float64) - expected.astype(np.float64))
            apart = apart[np.isfinite(apart)]
            gap = max(gap, float(apart.max()) if apart.size else 0.0)
    return goldens.rows, len(bad), gap, first


def _words(error: ParbakeError) -> str:
    return f"{error.message} at {error.path}" if error.path else error.message
