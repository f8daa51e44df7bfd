"""What a release is, and what is kept of it: frozen values that the state store gives and takes."""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

from msgspec import Struct

Kind = Literal["plain", "canary", "shadow", "ab", "bandit"]
ReleaseState = Literal["pending", "running", "live", "rolled_back", "superseded", "refused", "aborted"]
Ending = Literal["live", "rolled_back", "superseded", "refused", "aborted"]
Action = Literal["promote", "hold", "roll_back"]

Elsewhere = Literal["route", "alias", "release.refused"]
"""What is changed elsewhere, or never came to be a release, and is only told in the history."""

Details: TypeAlias = dict[str, Any]
"""What JSON can say. The store keeps it and does not look inside."""

OPEN: Final[tuple[ReleaseState, ...]] = ("pending", "running")
"""The states of a release that is under way; a deployment has one such release at most."""

ENDINGS: Final[dict[ReleaseState, tuple[Ending, ...]]] = {
    "pending": ("live", "refused", "aborted"),
    "running": ("live", "rolled_back", "superseded", "aborted"),
}
"""What a release may end as, by the state that it is in."""


class Deployment(Struct, frozen=True):
    """One name that callers ask for."""

    name: str
    settings: Details
    revision: int
    """Grows by one with every change of the settings."""
    created: float
    """Seconds since 1970, as all times here."""
    by: str


class Proposal(Struct, frozen=True):
    """What somebody wants released."""

    deployment: str
    version: str
    bundle_digest: str
    source: str = ""
    """Where the bundle came from: a path, a URL, or ``models:/eta/4``."""
    image: str = ""
    """Name and id of the OCI image with the bundle in it, as ``eta:3 sha256:...``; "" for the newest that is known."""
    table: str = ""
    """Path of the prediction table, or its digest."""
    kind: Kind = "plain"
    steps: tuple[float, ...] = (1.0,)
    """Shares of the traffic, one for each step."""
    every_s: float = 0.0
    """Least time between two steps."""
    margins: Details = {}
    """How much worse the new version may be, as the judge reads it."""


class Release(Struct, frozen=True):
    """One release: what was wanted, and how far it is. The value is good for one write: ``revision`` moves on."""

    id: int
    revision: int
    proposal: Proposal
    state: ReleaseState
    step: int
    """Index into the steps; -1 before the first."""
    judge_state: bytes
    """What the judge knows so far, as it wrote it."""
    created: float
    changed: float
    by: str
    why: str

    @property
    def share(self) -> float:
        """Share of the traffic that the version has by this release."""
        if self.state == "live":
            return 1.0
        return self.proposal.steps[self.step] if self.state == "running" and self.step >= 0 else 0.0


class ImageRecord(Struct, frozen=True):
    """An OCI image with a bundle in it."""

    tag: str
    image_id: str
    """``sha256:...``"""
    bundle_digest: str
    name: str = ""
    """Of the model, for the history."""
    version: str = ""
    by: str = ""
    at: float = 0.0

    @property
    def reference(self) -> str:
        """As proposals and the inventory have it."""
        return f"{self.tag} {self.image_id}"


class VerdictRecord(Struct, frozen=True):
    """What the judge said about a release, and why."""

    action: Action
    reason: str
    evidence: tuple[Details, ...] = ()
    id: int = 0
    """Of the store; 0 before it is kept."""
    release: int = 0
    at: float = 0.0


class WaiverRecord(Struct, frozen=True):
    """A check of the gate that somebody let pass by its name."""

    deployment: str
    version: str
    check: str
    by: str
    why: str
    evidence: Details = {}
    """What the check had found."""
    id: int = 0
    at: float = 0.0


class Parameters(Struct, frozen=True):
    """What may be changed while a deployment serves: thresholds, kill switch, timeouts. Versions are kept for good."""

    deployment: str
    version: int
    """0 where nobody has set any."""
    values: Details
    at: float = 0.0
    by: str = ""
    why: str = ""


class Event(Struct, frozen=True):
    """One line of the history."""

    id: int
    at: float
    by: str
    what: str
    """``release.begun``, ``verdict.hold``, ``waiver``, ``parameters`` and so on."""
    deployment: str
    """Empty where it concerns no deployment."""
    version: str = ""
    release: int = 0
    """0 where it concerns none."""
    why: str = ""
    details: Details = {}
    digest: str = ""
    """Of the bundle that it is about; empty where it is about none, or that is not known."""


Rewards: TypeAlias = dict[str, tuple[float, float]]
"""By version, the sum of the rewards and of what was missing to 1."""


class Lease(Struct, frozen=True):
    """The right to write for somebody's benefit, until somebody else has it."""

    name: str
    holder: str
    token: int
    """Greater with every change of hands: what comes with an older one is refused."""
    until: float
    """By the clock of the store."""


class Facts(Struct, frozen=True):
    """What the inventory wants to know of a version: who released it when, and what was let pass."""

    deployment: str
    version: str
    state: ReleaseState
    bundle_digest: str
    source: str
    image: str
    table: str
    released_by: str
    released_at: float
    why: str
    waivers: tuple[WaiverRecord, ...] = ()
