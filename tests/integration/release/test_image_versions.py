"""Which bundle goes into the image of a version, which image a release names, and which images stay because of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from parbake.app.image import Image, forget, record, references, resolver
from parbake.app.inventory import StoredFacts
from parbake.app.registry import register
from parbake.app.state import open_state
from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.errors import BundleMissing, Conflict, NotFound, RegistryAway, StateAway, VersionNotFound
from parbake.release.database import Database
from parbake.release.model import ImageRecord, Proposal, Release
from parbake.release.state import State
from parbake.settings import ReleaseSettings, ServerSettings, Settings
from tests.functions import write_scaled
from tests.sockets import free_port

pytestmark = pytest.mark.xdist_group("mlflow")

DIGEST = "sha256:" + "a" * 64


def put_live(
    state: State, version: str, digest: str = DIGEST, *, source: str = "", table: str = ""
) -> Release:
    begun = state.begin_release(Proposal("eta", version, digest, source, table=table), by="ana")
    return state.finish(begun, "live", by="ana")


def built(number: int, digest: str = DIGEST, tag: str = "eta:1") -> Image:
    return Image(f"sha256:{number:064x}", tag, "eta", "1", digest, ("sha256:1",), 1, "base", "buildah", "")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a project that has nothing yet."""
    return Settings(server=ServerSettings(state_dir=str(tmp_path / "state")))


@pytest.fixture
def releases(settings: Settings, tmp_path: Path) -> Callable[..., StoredBundle]:
    """Releases ``y = factor x`` as a version of eta, and gives its bundle."""

    def release(version: str, factor: float, path: Path | None = None) -> StoredBundle:
        bundle = write_scaled(path or tmp_path / f"{factor}.bundle", factor)
        with closing(open_state(settings)) as state:
            put_live(state, version, bundle.digest, source=str(bundle.path))
        return bundle

    return release


def test_a_registered_version_is_found_by_number_and_alias(tmp_path: Path, mlflow_file: str) -> None:
    server = ServerSettings(state_dir=str(tmp_path / "state"))
    store = ReleaseSettings(registry=mlflow_file, bundle_store=str(tmp_path / "store"))
    settings = Settings(server=server, release=store)
    resolve = resolver(settings)
    two, three = (write_scaled(tmp_path / f"{factor}.bundle", factor, name="imaged") for factor in (2, 3))
    register(settings, two.path)
    register(settings, three.path, alias="champion")
    for ref in ("imaged@2", "models:/imaged@2", "models:/imaged/2", "imaged@champion"):
        source = resolve(ref)
        assert (source.version, read_bundle(source.path).digest) == ("2", three.digest)
    assert resolve("imaged@1").version == "1"
    assert resolve(str(two.path)).version == ""
    with pytest.raises(VersionNotFound, match="has no version '7'"):
        resolve("imaged@7")
    # Another bundle was released under that number.
    with closing(open_state(settings)) as state:
        state.finish(state.begin_release(Proposal("imaged", "1", DIGEST), by="ana"), "live", by="ana")
    with pytest.raises(
        Conflict, match=r"imaged@1 is sha256:.* in the registry, and sha256:aaaaaaaaaaaa\.\.\."
    ):
        resolve("imaged@1")
    assert read_bundle(resolve("models:/imaged@1").path).digest == two.digest


def test_a_version_that_was_only_released_is_found_where_it_came_from(
    settings: Settings, releases: Callable[..., StoredBundle], tmp_path: Path
) -> None:
    bundle = releases("4", 2)
    source = resolver(settings)("eta@4")
    assert (source.path, source.version) == (bundle.path, "4")
    # No registry was made by asking.
    assert not (tmp_path / "state" / "mlflow.db").exists()
    # Another bundle lies there now.
    write_scaled(bundle.path, 5, replace=True)
    with pytest.raises(BundleMissing, match=f"no bundle {bundle.digest[:19]}"):
        resolver(settings)("eta@4")
    with pytest.raises(VersionNotFound, match=r"no version '5' of 'eta' is registered or released here"):
        resolver(settings)("eta@5")
    with pytest.raises(NotFound, match=r"no bundle at .*nothing\.bundle"):
        resolver(settings)(str(tmp_path / "nothing.bundle"))


def test_releases_are_enough_while_the_registry_is_away(
    settings: Settings, releases: Callable[..., StoredBundle]
) -> None:
    away = ReleaseSettings(registry=f"http://127.0.0.1:{free_port()}")
    bundle = releases("4", 2)
    resolve = resolver(msgspec.structs.replace(settings, release=away))
    assert resolve("eta@4").path == bundle.path
    for ref in ("eta@5", "models:/eta@4"):
        with pytest.raises(RegistryAway):
            resolve(ref)


def test_a_release_names_the_image_of_its_bundle_whichever_came_first(state: Database) -> None:
    state.record_image(ImageRecord("eta:1", "sha256:old", DIGEST, "eta", "1", by="bob"))
    first = put_live(state, "1", table="blake2b:1")
    assert first.proposal.image == "eta:1 sha256:old"
    put_live(state, "2", "sha256:other", table="blake2b:2")
    state.record_image(ImageRecord("eta:2", "sha256:new", "sha256:other", "eta", "2", by="bob"))
    two = state.facts("eta", "2")
    assert two is not None
    assert two.image == "eta:2 sha256:new"
    (fact,) = (one for one in StoredFacts(state).of(["eta"]) if one.version == "1")
    assert fact.image == "eta:1 sha256:old"
    # One rollback: model, image and table.
    back = state.roll_back("eta", by="ana", why="late orders")
    wanted = {"bundle_digest": DIGEST, "image": "eta:1 sha256:old", "table": "blake2b:1"}
    assert {name: getattr(back.proposal, name) for name in wanted} == wanted
    event = state.history("eta")[-1]
    assert (event.what, event.details) == ("release.live", {"before": "superseded", **wanted})


def test_a_tag_is_the_newest_image_that_was_given_it(state: Database) -> None:
    old, new = (ImageRecord("eta:1", f"sha256:{n}", DIGEST, "eta", "1", by="bob") for n in (1, 2))
    state.record_image(old)
    state.record_image(new)
    assert [(one.tag, one.image_id) for one in state.images(DIGEST)] == [("eta:1", "sha256:2")]
    # What went was the other one.
    state.forget_image(old, by="bob")
    assert len(state.images()) == 1
    state.forget_image(new, by="bob")
    assert state.images() == []
    words = [f"{event.what} {event.details['id']}" for event in state.history("eta")]
    assert words == ["image.built sha256:1", "image.built sha256:2", "image.removed sha256:2"]


def test_what_is_live_or_may_be_gone_back_to_is_needed(settings: Settings) -> None:
    assert references(settings) == {}
    assert record(settings, built(1, "sha256:one"))
    with closing(open_state(settings)) as state:
        for number, digest in enumerate(("zero", "one", "two"), 1):
            put_live(state, str(number), f"sha256:{digest}")
        state.begin_release(Proposal("eta", "4", "sha256:three"), by="ana")
        assert references(settings) == {
            "sha256:three": "version 4 of eta is being released",
            "sha256:two": "version 3 of eta is live",
            "sha256:one": "version 2 of eta is the last good",
            built(1).id: "version 2 of eta is the last good",
        }
        state.roll_back("eta", by="ana")
    assert references(settings) == {
        "sha256:two": "version 3 of eta is live",
        "sha256:one": "version 2 of eta is the last good",
        built(1).id: "version 2 of eta is the last good",
    }
    forget(settings, [built(1, "sha256:one")])
    with closing(open_state(settings)) as state:
        assert state.images() == []


def test_nobody_knows_what_is_needed_while_the_store_is_away(settings: Settings) -> None:
    away = ReleaseSettings(store=f"postgresql://nobody@127.0.0.1:{free_port()}/db")
    with pytest.raises(StateAway):
        references(msgspec.structs.replace(settings, release=away))
