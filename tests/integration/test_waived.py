"""A version whose checks were waived is served all the same, wherever its model runs; one whose were not is refused."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from parbake.app.supervisor import Supervisor
from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.errors import GoldensDiffer, ParbakeError
from parbake.settings import DeploymentSettings, LoadWhen, Placement, ServerSettings, Settings

HOW: list[tuple[Placement, LoadWhen]] = [
    ("inline", "always"),
    ("process", "always"),
    ("process", "on-demand"),
]


def altered(bundle: StoredBundle, out: Path) -> StoredBundle:
    """The same bundle with goldens that its model does not answer."""
    goldens = bundle.goldens()
    return write_bundle(
        out,
        bundle.contract,
        {"model.onnx": bundle.file("model.onnx").read_bytes()},
        Goldens(goldens.inputs, {"y": goldens.outputs["y"] + 1}),
        bundle.environment,
    )


@pytest.mark.parametrize(("placement", "load"), HOW)
@pytest.mark.parametrize("waived", [(), ("goldens",)])
def test_goldens_that_differ_are_served_only_where_that_was_waived(
    tmp_path: Path,
    doubler_bundle: StoredBundle,
    placement: Placement,
    load: LoadWhen,
    waived: tuple[str, ...],
) -> None:
    bundle = altered(doubler_bundle, tmp_path / "altered.bundle")
    settings = Settings(
        server=ServerSettings(port=0, workers=1),
        deployments=(DeploymentSettings(bundle=str(bundle.path), placement=placement, load=load),),
    )
    folder = tmp_path / "s"
    folder.mkdir()

    def ask(port: int) -> object:
        row = json.dumps({"left": 1.0, "right": 2.5}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict/doubler", row, timeout=30) as response:
            return json.loads(response.read())

    async def run() -> object:
        supervisor = Supervisor(settings, folder)
        for target in supervisor._targets:
            target.waived = waived
        try:
            await supervisor.start()
            return await asyncio.to_thread(ask, supervisor.port)
        finally:
            await supervisor.stop(drain=False)

    if waived:
        assert asyncio.run(run()) == {"y": [2.0, 5.0]}
    elif load == "always":
        with pytest.raises(GoldensDiffer):
            asyncio.run(run())
    else:
        with pytest.raises((ParbakeError, urllib.error.HTTPError)):
            asyncio.run(run())
