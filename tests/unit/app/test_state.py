"""Which store the settings name, and what is said where its library is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from parbake.app.state import open_state, state_dir, store_url
from parbake.settings import ReleaseSettings, ServerSettings, Settings


def test_the_store_is_a_file_in_the_state_directory_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_url(Settings()) == f"sqlite:///{tmp_path}/.parbake/state.db"
    elsewhere = Settings(server=ServerSettings(state_dir="/var/lib/parbake"))
    assert state_dir(elsewhere) == Path("/var/lib/parbake")
    assert store_url(elsewhere) == "sqlite:////var/lib/parbake/state.db"
    named = Settings(release=ReleaseSettings(store="postgresql://db/parbake"))
    assert store_url(named) == "postgresql://db/parbake"


@pytest.mark.parametrize("name", ["kept", "a b%20c?d=#e;ü"])
def test_a_store_opened_by_its_settings_is_kept(tmp_path: Path, name: str) -> None:
    settings = Settings(server=ServerSettings(state_dir=str(tmp_path / name)))
    state = open_state(settings)
    state.set_parameters("eta", {"a": 1}, after=0, by="ana")
    state.close()
    assert (tmp_path / name / "state.db").is_file()
    state = open_state(settings, create=False)
    assert state.parameters("eta").values == {"a": 1}
    state.close()


def test_without_the_library_the_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['sqlalchemy'] = None; import parbake.cli.main as m; sys.exit(m.main(['history']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 6
    assert done.stderr == "error: SQLAlchemy is not installed\nhint: pip install 'parbake[release]'\n"
