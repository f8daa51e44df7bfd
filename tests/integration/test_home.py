"""A server leaves nothing in the home of whoever runs it, and needs none."""

from __future__ import annotations

from pathlib import Path

import pytest

from parbake.contract.ort import SWITCH
from parbake.testing import serving
from tests.functions import write_function, write_scaled
from tests.traffic import answer, infer, once


@pytest.mark.parametrize("home", ["empty", "/proc/nowhere"])
def test_a_home_stays_as_it_was_and_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    # What libraries look at before they write; and what this process has set for itself.
    for name in ("CI", "GITHUB_ACTIONS", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", SWITCH):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / home
    if home == "empty":
        folder.mkdir()
    scaled = write_scaled(tmp_path / "scaled.bundle", 2)
    own = write_function(tmp_path, "def predict(x):\n    return 3 * x\n", name="own")
    with serving(scaled.path, own.path, workers=1, environment={"HOME": str(folder)}) as server:
        for name, factor in (("scaled", 2), ("own", 3)):
            assert answer(once(server.url, f"/v2/models/{name}/infer", infer((1.0, 2.0)))) == [
                factor,
                2 * factor,
            ]
        assert server.stop() == 0
    if home == "empty":
        assert list(folder.iterdir()) == []
