"""What the fronts shall serve: a whole plan, sent by the supervisor, prepared beside the old one, then swapped in."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from parbake.settings import Mode, Placement


class PlanEntry(Struct, frozen=True):
    """One version of one deployment. Two equal entries are the same thing, and are kept running."""

    name: str
    version: str
    bundle: str
    digest: str
    mode: Mode
    placement: Placement
    deadline_ms: float
    max_queue_rows: int
    max_batch_rows: int
    batch_delay_ms: float
    table: str = ""
    table_digest: str = ""
    """Digest of the table's lineage: another table under the same path is not the one that was verified."""
    table_expires: float = 0.0
    """Unix time at which the contract's freshness ends for this table; 0 for never."""
    sockets: tuple[str, ...] = ()
    """Where the runners of this version listen."""
    threads: int = 1
    allow_pickle: bool = False
    allow_mismatch: bool = False
    prove: bool = True
    """Whether to refuse the bundle where this machine answers its goldens otherwise; not where that was waived."""
    verify: bool = False
    """Whether every process that loads the bundle holds its files against the digest: it was trusted for that."""
    head_rows: int = 0
    """Budget of the learned head, in each front."""
    head_bytes: int = 0
    warm_s: float = 0.0
    fallback: str = ""
    """What answers where the model cannot: ``default``, ``last``, or the name of another deployment."""
    on_demand: bool = False
    """Whether the model sleeps until it is wanted."""
    pinned: bool = False
    """Whether it is awake all the same, for good."""
    group: str = ""
    """Which models may share its process, where it is loaded on demand."""
    marks: str = ""
    """File that says what the models of a room are at work on, and ``slot`` where in it this one is."""
    slot: int = 0


class Plan(Struct, frozen=True):
    """Everything that is served; of several versions of a name the last one is the default."""

    generation: int
    entries: tuple[PlanEntry, ...] = ()
    unloaded: tuple[str, ...] = ()
    """Deployments that are configured and not loaded."""


class Placed(Struct, frozen=True):
    """Where a front would run a version, and what it measured for that."""

    name: str
    version: str
    placement: Literal["inline", "process"]
    row_us: float
    hop_us: float
