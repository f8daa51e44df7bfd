"""The traffic of the deployments, put together from what each front has measured."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from parbake.monitoring.model import Traffic
from parbake.monitoring.profile import TrafficProfile


class TrafficReport(Struct, frozen=True):
    """What was asked of one deployment: figures with their errors, and the profile that they were read from."""

    traffic: Traffic
    profile: bytes
    """For `parbake.monitoring.profile.TrafficProfile.from_bytes`: to be merged with those of other machines."""


def report(parts: Iterable[dict[str, bytes]]) -> dict[str, TrafficReport]:
    """Merge the profiles of several fronts, by deployment."""
    merged: dict[str, TrafficProfile] = {}
    for part in parts:
        for name, data in part.items():
            profile = TrafficProfile.from_bytes(data)
            if name in merged:
                merged[name].merge(profile)
            else:
                merged[name] = profile
    return {name: TrafficReport(profile.traffic(), profile.to_bytes()) for name, profile in merged.items()}
