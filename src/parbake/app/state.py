"""The store of releases as the settings name it: opened, or said why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from parbake.errors import MissingExtra
from parbake.settings import Settings

if TYPE_CHECKING:
    from parbake.release.state import State

DEFAULT_STATE_DIR: Final = ".parbake"
"""Folder of what a server keeps by itself, in the working directory."""

STATE_FILE: Final = "state.db"
QUEUE_FILE: Final = "queue/jobs.db"
"""In a folder of its own, which can be renamed in one step with all that belongs to it."""


def state_dir(settings: Settings) -> Path:
    """The folder of what a server keeps by itself."""
    return Path(settings.server.state_dir or DEFAULT_STATE_DIR)


def queue_file(settings: Settings) -> Path:
    """Where jobs are kept."""
    return state_dir(settings).absolute() / QUEUE_FILE


def store_url(settings: Settings) -> str:
    """Where the store of releases is: as set, else SQLite in the state directory."""
    return settings.release.store or f"sqlite:///{quote(str(state_dir(settings).absolute() / STATE_FILE))}"


def open_state(settings: Settings, *, create: bool = True) -> State:
    """The store, ready to use. ``create`` false leaves a SQLite file that is not there alone.

    Raises `NotFound`, `SettingsError`, `StateAway`, `StateTorn`, `StateTooNew`, `MissingExtra`.
    """
    try:
        from parbake.release.database import open_database
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sqlalchemy":
            raise
        raise MissingExtra("SQLAlchemy", "release") from error
    return open_database(store_url(settings), create=create)
