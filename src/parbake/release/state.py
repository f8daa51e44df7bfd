"""What the state of releases is to those who change it: verbs that happen as a whole, or not at all.

Each verb is one transaction that also writes its line of the history. A verb that takes a `Release` compares it
with what is stored: where somebody else was faster, it raises `Conflict` and nothing has changed.

All verbs raise `StateAway` where the store cannot be reached or written. Then the verb may have happened or not;
asked again with the same `Release`, revision or version, it happens once at most; only a verdict, a waiver or what
was changed elsewhere may then be there twice. A verb may wait for some seconds, so nobody calls it from an event
loop. A store is for the process that opened it: its connections do not survive a fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from parbake.release.model import (
    Deployment,
    Details,
    Elsewhere,
    Ending,
    Event,
    Facts,
    ImageRecord,
    Lease,
    Parameters,
    Proposal,
    Release,
    Rewards,
    VerdictRecord,
    WaiverRecord,
)


class FactsSource(Protocol):
    """What the inventory asks of the store."""

    def facts(self, deployment: str, version: str) -> Facts | None:
        """What is known of a version's newest release, or None where it was never released."""


class State(FactsSource, Protocol):
    """The store. Safe to use from several threads and processes at once."""

    def begin_release(
        self, proposal: Proposal, *, by: str, why: str = "", fence: Lease | None = None
    ) -> Release:
        """A new release, pending. Raises `Conflict` where one of the same deployment is under way.

        Where the proposal names no image, it gets the newest with its bundle.
        """

    def advance(
        self,
        release: Release,
        step: int,
        *,
        by: str,
        why: str = "",
        judge_state: bytes | None = None,
        fence: Lease | None = None,
    ) -> Release:
        """Put a release that is under way on a step. Raises `Conflict`, `InvalidInput` for a step it does not have."""

    def finish(
        self, release: Release, state: Ending, *, by: str, why: str = "", fence: Lease | None = None
    ) -> Release:
        """End a release. One that goes live supersedes the one that was live. Raises `Conflict`."""

    def roll_back(
        self, deployment: str, *, to: str = "", by: str, why: str = "", fence: Lease | None = None
    ) -> Release:
        """Go back to `last_good`, or to the version ``to`` that was live before; gives the release that is live now.

        A release under way ends as rolled back, and so does the live one where it is left.
        Raises `Conflict` where there is nothing to go back to, `VersionNotFound` where ``to`` was never live.
        """

    def remember(self, release: Release, judge_state: bytes, *, fence: Lease | None = None) -> Release:
        """Keep what the judge knows. The one write without a line of history: it changes nothing for anybody."""

    def share_rewards(self, release: Release, holder: str, rewards: Rewards) -> Rewards:
        """Keep what versions have earned by what one server knows; gives what the others know, together.

        Like `remember` without a line of history. Where the release has ended, nothing is kept and none are given.
        """

    def record_verdict(
        self, release: Release, verdict: VerdictRecord, *, by: str, fence: Lease | None = None
    ) -> VerdictRecord:
        """Keep a verdict on a release. Its revision stays as it is."""

    def record_waiver(self, waiver: WaiverRecord) -> WaiverRecord:
        """Keep that a check was let pass."""

    def record_change(
        self, what: Elsewhere, deployment: str, *, version: str = "", by: str, why: str = "", details: Details
    ) -> None:
        """Keep that somebody has changed what is not in the store: a route, an alias."""

    def record_image(self, image: ImageRecord) -> None:
        """Keep which bundle is in an image; whatever had its tag before is forgotten."""

    def forget_image(self, image: ImageRecord, *, by: str) -> None:
        """Keep that an image is gone. Nothing happens where its tag is another's by now."""

    def images(self, bundle_digest: str = "") -> Sequence[ImageRecord]:
        """The images that are known, of a bundle or all, the newest last."""

    def configure(
        self, deployment: str, settings: Details, *, revision: int, by: str, why: str = ""
    ) -> Deployment:
        """Set a deployment's settings; ``revision`` 0 makes it. Raises `Conflict` where it has another revision."""

    def set_parameters(
        self, deployment: str, values: Details, *, after: int, by: str, why: str = ""
    ) -> Parameters:
        """A new version of the parameters. Raises `Conflict` where the newest is not version ``after``."""

    def parameters(self, deployment: str, version: int | None = None) -> Parameters:
        """The parameters of a version, else the newest. Raises `NotFound` for a version that never was."""

    def lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        """Take or renew a lease; None while somebody else has it.

        The clock is the store's. Where it jumps, a lease may end early or change hands: ``fence`` is what keeps
        writes safe, as a verb with a lease that has changed hands raises `LeaseLost`.
        """

    def give_up(self, lease: Lease) -> None:
        """Let others have the lease at once. Nothing happens where it is lost already."""

    def release(self, number: int) -> Release:
        """A release as it is now. Raises `NotFound`."""

    def releases(self, deployment: str = "", *, under_way: bool = False) -> Sequence[Release]:
        """Releases, oldest first: of a deployment, or all; ``under_way`` leaves out what has ended."""

    def live(self, deployment: str) -> Release | None:
        """The release that answers."""

    def last_good(self, deployment: str) -> Release | None:
        """Where a rollback goes: while a release is under way the live one, else the one that was live before it."""

    def verdicts(self, release: Release) -> Sequence[VerdictRecord]:
        """The verdicts on a release, oldest first."""

    def waivers(self, deployment: str, version: str = "") -> Sequence[WaiverRecord]:
        """What was let pass, oldest first."""

    def deployments(self) -> Sequence[Deployment]:
        """All deployments, by name."""

    def history(self, deployment: str = "", *, since: float = 0.0, limit: int = 1000) -> Sequence[Event]:
        """The newest ``limit`` events from ``since`` on, oldest first: of a deployment, or all."""

    def close(self) -> None:
        """Release the connections. Closing twice is allowed."""
