"""The model repository of a running server, as any of its fronts is asked for it: list, load, unload, count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from parbake.app.control import (
    AllCounts,
    GetMetrics,
    GetStatistics,
    Label,
    LabelsTaken,
    Load,
    Message,
    Text,
    Unload,
)
from parbake.app.front import Front
from parbake.app.labels import Labelled
from parbake.contract.model import NAME_PATTERN
from parbake.errors import ModelNotFound, NotReady
from parbake.serving.service import ServedVersion

_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of the index; ``version`` is "" for a deployment that is not loaded."""

    name: str
    version: str
    ready: bool
    reason: str = ""
    """Why it does not answer."""


class Repository:
    """What concerns the whole server and not this front alone goes to the supervisor."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def index(self, *, ready_only: bool = False) -> list[Listed]:
        """Every version that is served, then the deployments that are not loaded."""
        found = [
            Listed(s.name, s.version, s.ready, "" if s.ready else "its process is being started again")
            for s in self._front.versions()
        ]
        found += [Listed(name, "", False, "unloaded") for name in self._front.unloaded()]
        return [item for item in found if item.ready or not ready_only]

    def versions(self, name: str = "", version: str = "") -> list[ServedVersion]:
        """The versions that are served; ``name`` and ``version`` narrow it down."""
        return [s for s in self._front.versions() if name in ("", s.name) and version in ("", s.version)]

    async def set_loaded(self, name: str, *, loaded: bool) -> None:
        """Load or unload a deployment in all fronts. Raises `ModelNotFound`, or what loading raises."""
        if not NAME_PATTERN.match(name):
            raise ModelNotFound(f"no model {name[:80]!r} is configured")
        await self._ask(Load(name) if loaded else Unload(name))

    async def counts(self) -> AllCounts:
        """What all fronts have counted since the start. Raises `NotReady`."""
        reply = await self._ask(GetStatistics())
        return reply if isinstance(reply, AllCounts) else AllCounts(())

    async def label(self, name: str, labels: tuple[Labelled, ...]) -> LabelsTaken:
        """Have labels joined to the predictions of a deployment. Raises `Conflict`, `InvalidInput`, `NotReady`."""
        reply = await self._ask(Label(name, labels))
        return reply if isinstance(reply, LabelsTaken) else LabelsTaken(0, len(labels))

    async def metrics(self) -> str:
        """The page for Prometheus. Raises `NotReady`."""
        reply = await self._ask(GetMetrics())
        return reply.text if isinstance(reply, Text) else ""

    async def _ask(self, message: Message) -> Message:
        channel = self._front.channel
        if channel is None:
            raise NotReady("the supervisor is not there")
        return await channel.call(message, _TIMEOUT_S)
