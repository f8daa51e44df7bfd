"""All scenarios, in the order in which they are played and written down."""

from __future__ import annotations

from typing import Final

from chaos.model import Scenario
from chaos.scenarios import changes, clients, clock, disk, jobs, models, overload, processes, tables

_MODULES: Final = (processes, jobs, models, tables, disk, clock, clients, overload, changes)

ALL: Final[dict[str, Scenario]] = {
    scenario.name: scenario for module in _MODULES for scenario in module.SCENARIOS
}
