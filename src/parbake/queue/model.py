"""What a job is: a request whose caller does not wait, and what has become of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

State = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
"""``done`` and ``failed`` have an answer, ``failed`` one that is an error; ``dead`` was given up."""

OPEN: Final[tuple[State, ...]] = ("queued", "running")
"""The states that are not the last."""

Form = Literal["infer", "predict"]
"""Of a request: the Open Inference Protocol, or rows by column name."""

MEANT: Final = (b"content-encoding", b"inference-header-content-length")
"""Headers that say how a body is to be read."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for a prediction, with all that its answer depends on."""

    deployment: str
    version: str
    """As the URL named it; "" for whichever answers."""
    form: Form
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    """Those that body, answer or route go by; names in lower case."""
    body: bytes

    def digest(self) -> bytes:
        """Equal for requests that ask for the same; headers that do not concern the body are left out."""
        parts = [self.deployment.encode(), self.version.encode(), self.form.encode(), self.query]
        for name, value in sorted(self.headers):
            if name in MEANT:
                parts += (name, value)
        digest = hashlib.blake2b(digest_size=16)
        for part in (*parts, self.body):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it is sent: ``headers`` are those besides content-length and connection."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that is to be taken. ``key`` is the caller's idempotency key, "" for none."""

    id: str
    owner: str
    """Name of the API key that asked, "" where none is needed: to nobody else is there such a job."""
    key: str
    request: Request
    digest: bytes | None = None
    """Of the request, where it was worked out before: of a large one that takes a while."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is now."""

    id: str
    deployment: str
    version: str
    owner: str
    state: State
    attempts: int
    """How often it was begun, and not refused before any work."""
    created: float
    """Unix time, by the clock as it was then."""
    age_s: float
    """Since it was taken."""
    ahead: int
    """Unanswered jobs of its deployment that were taken before it; 0 for one that is answered."""
    status: int
    """HTTP status of the answer; 0 while there is none."""
    error: str
    """What was wrong the last time; "" where nothing was."""

    @property
    def finished(self) -> bool:
        """Whether nothing more will become of it."""
        return self.state not in OPEN


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that a front has taken to answer. Whoever else takes it gets another ``token``."""

    number: int
    token: int
    id: str
    owner: str
    attempts: int
    """This one included."""
    refusals: int
    """How often it was put off."""
    lost: int
    """How often whoever had it was not heard of again."""
    request: Request


@dataclass(frozen=True, slots=True)
class Depth:
    """The unanswered jobs of a deployment."""

    deployment: str
    queued: int
    running: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Tally:
    """The jobs of a deployment in one state."""

    deployment: str
    state: State
    count: int
    oldest_s: float
    """Since the oldest was taken."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A job that was given up."""

    job: Job
    dead_s: float
    """Since then."""
    kept: bool
    """Whether its request is there, so that it can be begun again."""


Revival = Literal["queued", "missing", "not dead", "not kept", "no room"]
"""What came of beginning a dead job again; ``missing`` is the job, ``not kept`` its request."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is promised of jobs, and what they may take; see `parbake.settings.QueueSettings`."""

    waiting: int
    at_once: int
    bytes: int
    keep_s: float
    attempts: int
    give_up_s: float
    lease_s: float
