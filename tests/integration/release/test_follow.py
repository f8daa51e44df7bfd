"""A server that loads from the registry follows an alias, and serves on when registry or store are away."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from parbake.app.registry import open_bundles, open_registry
from parbake.app.releases import Back, Wanted
from parbake.app.supervisor import Change
from parbake.contract.bundle import MANIFEST, read_bundle
from parbake.errors import Conflict, ModelNotFound, ServerNotFound, VersionNotFound
from parbake.release.bundles import folder_name
from parbake.release.registry import Registration
from parbake.testing import serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.mlflow_server import MlflowServer
from tests.s3 import BUCKET, Moto
from tests.traffic import answer, calling, infer, once, rows, wait_for

pytestmark = pytest.mark.xdist_group("mlflow")


class Released:
    """A registry, a bundle store, and a way to fill both."""

    def __init__(self, folder: Path, server: MlflowServer, store: str) -> None:
        self.folder, self.server, self.store = folder, server, store
        self.registry = open_registry(server.url)
        # The server keeps what other tests have registered.
        self.name = f"m{uuid.uuid4().hex[:12]}"
        self.reference = f"models:/{self.name}@champion"

    def register(self, factor: float, *, alias: bool = True, path: Path | None = None) -> str:
        """Register ``y = factor x``, let champion point at it, and give its version."""
        # Again, where a store has lost it.
        path = path or write_scaled(self.folder / f"by-{factor}.bundle", factor, replace=True).path
        bundle = read_bundle(path)
        where = open_bundles(self.store).put(bundle)
        version = self.registry.register(Registration(self.name, bundle.digest, "p", "o", where)).version
        if alias:
            self.point(version)
        return version

    def point(self, version: str) -> None:
        """Let champion point at a version."""
        self.registry.alias(self.name, "champion", version)

    def factor(self, url: str) -> float:
        """What a server multiplies by."""
        return answer(once(url, f"/v2/models/{self.name}/infer", infer((1.0, 2.0))))[0]

    def options(self, **more: object) -> dict[str, Any]:
        """Of a server that follows."""
        return {
            "registry": self.server.url, "bundle_store": self.store, "state_dir": self.folder / "state",
            "follow_s": 0.3, "workers": 1, **more,
        }  # fmt: skip


@pytest.fixture
def released(tmp_path: Path, mlflow_server: MlflowServer) -> Released:
    """With two versions, of which the first is champion."""
    released = Released(tmp_path, mlflow_server, str(tmp_path / "store"))
    released.register(2)
    released.register(3, alias=False)
    return released


def test_a_moved_alias_is_followed_without_a_failed_request(released: Released) -> None:
    with (
        serving(released.reference, **released.options()) as server,
        calling(server.url, rows(released.name, (1.0, 2.0))) as callers,
    ):
        assert released.factor(server.url) == 2
        released.point("2")
        wait_for(lambda: released.factor(server.url) == 3)
        for caller in callers:
            caller.wait(10)
            assert not caller.failures
        (version,) = client.status(port=server.port).versions
        assert version.version == "2"
        (following,) = client.status(port=server.port).following
        assert (following.reference, following.version, following.away_since) == (
            released.reference,
            "2",
            0.0,
        )


def test_a_push_is_followed_at_once(released: Released) -> None:
    with serving(released.reference, **released.options(follow_s=0)) as server:
        released.point("2")
        assert client.reload(port=server.port).changed == (f"{released.name}:2",)
        assert released.factor(server.url) == 3
        client.reload([Change(bundle=f"models:/{released.name}@1")], port=server.port)
        assert released.factor(server.url) == 2


def test_the_registry_goes_away_and_comes_back_while_it_serves(released: Released) -> None:
    with (
        serving(released.reference, **released.options()) as server,
        calling(server.url, rows(released.name, (1.0, 2.0))) as callers,
    ):
        released.server.kill()
        before = time.time()
        wait_for(lambda: client.status(port=server.port).following[0].away_since)
        assert client.status(port=server.port).following[0].away_since <= time.time()
        assert client.status(port=server.port).following[0].away_since > before - 5
        metrics = client.metrics(port=server.port)
        assert "parbake_registry_away_since_timestamp_seconds 1." in metrics
        time.sleep(1)
        assert server.log().count("registry.away") == 1
        released.server.start()
        released.point("2")
        wait_for(lambda: released.factor(server.url) == 3)
        assert client.status(port=server.port).following[0].away_since == 0
        assert not any(caller.failures for caller in callers)


def test_while_the_registry_is_away_a_server_starts_from_its_cache_and_waits_without_one(
    released: Released,
) -> None:
    released.point("2")
    with serving(released.reference, **released.options()) as server:
        assert released.factor(server.url) == 3
    released.server.kill()
    with serving(released.reference, **released.options()) as server:
        assert released.factor(server.url) == 3
        (following,) = client.status(port=server.port).following
        assert (following.version, following.answered) == ("2", 0.0)
        assert following.away_since
        assert "from the cache" in server.log()
    with (
        pytest.raises(ServerNotFound, match=r"registry\.awaited"),
        serving(released.reference, timeout_s=12, **released.options(state_dir=released.folder / "none")),
    ):
        pass


def test_a_version_that_fails_its_checks_is_not_followed(released: Released, tmp_path: Path) -> None:
    broken = write_function(tmp_path, "import nowhere\ndef predict(x):\n    return x\n", name="scaled")
    version = released.register(0, alias=False, path=broken.path)
    with serving(released.reference, **released.options()) as server:
        released.point(version)
        wait_for(lambda: client.status(port=server.port).following[0].problem)
        (following,) = client.status(port=server.port).following
        assert (following.version, following.wanted) == ("1", version)
        assert released.factor(server.url) == 2
        assert "parbake_reference_behind" in client.metrics(port=server.port)
        time.sleep(1)
        assert server.log().count("alias.not_followed") == 1
        released.point("2")
        wait_for(lambda: released.factor(server.url) == 3)
        assert not client.status(port=server.port).following[0].problem


def test_what_is_not_registered_is_said_at_the_start(released: Released) -> None:
    for reference, words in (
        (f"models:/{released.name}@nobody", "no alias 'nobody'"),
        (f"models:/{released.name}@7", "no version '7'"),
        ("models:/other@champion", "no model 'other'"),
    ):
        with pytest.raises(ServerNotFound, match=words), serving(reference, **released.options()):
            pass


def test_a_server_that_starts_empty_is_ready_when_it_has_a_model(released: Released) -> None:
    with serving(**released.options(empty=True)) as server:
        assert once(server.url, "/v2/health/live").status == 200
        assert once(server.url, "/v2/health/ready").status == 503
        client.reload([Change(bundle=released.reference)], port=server.port)
        assert once(server.url, "/v2/health/ready").status == 200
        assert released.factor(server.url) == 2
        released.point("2")
        wait_for(lambda: released.factor(server.url) == 3)
        with pytest.raises((ModelNotFound, VersionNotFound)):
            client.reload([Change(bundle="models:/other@1")], port=server.port)
        assert released.factor(server.url) == 3


def test_a_hung_registry_does_not_hold_up_answers(released: Released) -> None:
    with serving(released.reference, **released.options()) as server:
        released.server.hang()
        try:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                started = time.monotonic()
                assert released.factor(server.url) == 2
                assert time.monotonic() - started < 1
            assert server.stop() == 0
        finally:
            released.server.go_on()


def test_the_bundle_store_dies_in_the_middle_and_what_is_cached_serves_on(
    tmp_path: Path, own_moto: Moto, mlflow_server: MlflowServer
) -> None:
    import obstore
    from obstore.store import S3Store

    released = Released(tmp_path, mlflow_server, f"s3://{BUCKET}/bundles")
    released.register(2)
    released.register(3, alias=False)
    with serving(released.reference, **released.options()) as server:
        own_moto.kill()
        released.point("2")
        wait_for(lambda: client.status(port=server.port).following[0].problem)
        (following,) = client.status(port=server.port).following
        assert "bundle store" in following.problem
        assert (following.version, following.wanted) == ("1", "2")
        assert released.factor(server.url) == 2
        # It is tried again, and taken in when the store is back with what it had, not before.
        own_moto.start()
        wait_for(lambda: "no bundle" in client.status(port=server.port).following[0].problem)
        bundle = read_bundle(tmp_path / "by-3.bundle")
        behind = S3Store(BUCKET, client_options={"allow_http": True})
        obstore.put(behind, f"bundles/{folder_name(bundle.digest)}/{MANIFEST}", b"torn")
        wait_for(lambda: "not valid JSON" in client.status(port=server.port).following[0].problem)
        assert released.factor(server.url) == 2
        open_bundles(released.store).put(bundle)
        wait_for(lambda: released.factor(server.url) == 3)
        assert not client.status(port=server.port).following[0].problem
        assert server.log().count("alias.not_followed") == 3


def test_who_follows_an_alias_is_not_held_to_what_was_released_before(released: Released) -> None:
    def register(factor: float) -> str:
        path = write_scaled(released.folder / f"named-{factor}.bundle", factor, name=released.name).path
        return released.register(factor, alias=False, path=path)

    first, second = register(2.0), register(3.0)
    released.point(first)
    with serving(f"models:/{released.name}@{first}", **released.options()) as server:
        wanted = Wanted(second, f"models:/{released.name}@{second}", by="ada")
        assert client.release(released.name, wanted, port=server.port).state == "live"
        assert released.factor(server.url) == 3.0
    with serving(released.reference, **released.options()) as server:
        assert released.factor(server.url) == 2.0
        with pytest.raises(Conflict, match="follows"):
            client.rollback(released.name, Back(), port=server.port)
        with pytest.raises(Conflict, match="follows"):
            client.release(released.name, wanted, port=server.port)
