"""What goes into an image: pins, versions, labels."""

from __future__ import annotations

import pytest

from parbake.contract.bundle import StoredBundle
from parbake.contract.model import Environment, Library
from parbake.errors import EnvironmentDiffers, SettingsError
from parbake.release.image import Base, Pin, containerfile, labels, pins, reference, wanted
from parbake.release.image_parts import requirements

BASE = Base("3.11", "x86_64", "2.36", "/site", "FROM scratch FROM_AS\nADD base.tar /")
LOCK = """# made by a machine
colorama==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:{0}
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:{1} \\
    --hash=sha256:{2}
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:{0}
""".format("a" * 64, "b" * 64, "c" * 64)


def environment(python: str = "3.11.7", required: tuple[str, ...] = (), **libraries: str) -> Environment:
    installed = tuple(Library(name, version) for name, version in libraries.items())
    return Environment(python, "CPython", "Linux 6", "x86_64", installed, required)


def test_the_lock_is_read_for_the_base_and_not_for_this_python() -> None:
    found = wanted(pins(LOCK), environment(), BASE)
    assert found.known == (
        Pin("numpy", "2.4.6", (f"sha256:{'b' * 64}", f"sha256:{'c' * 64}"), "python_full_version < '3.12'"),
    )
    newer = Base("3.12", "x86_64", "2.36", "/site", "")
    assert wanted(pins(LOCK), environment("3.12.1"), newer).known[0].version == "2.5.5"


def test_every_pin_of_the_server_has_its_hashes() -> None:
    found = pins(requirements())
    assert {"onnxruntime", "numpy", "msgspec"} <= {pin.name for pin in found}
    assert all(pin.hashes for pin in found)


def test_the_version_of_the_bundles_lock_wins_and_its_hashes_must_be_asked_for() -> None:
    found = wanted(pins(LOCK), environment(numpy="2.3.0", torch="2.13.0"), BASE)
    assert (found.known, found.unknown) == ((), (Pin("numpy", "2.3.0"),))


def test_what_the_bundles_code_requires_is_added_at_its_version() -> None:
    found = wanted(pins(LOCK), environment(required=("scikit_learn",), **{"scikit-learn": "1.7.0"}), BASE)
    assert found.unknown == (Pin("scikit-learn", "1.7.0"),)
    assert found.within == {"scikit-learn": "1.7.0"}


def test_own_code_does_not_go_onto_another_python() -> None:
    packed = environment("3.13.1", ("scikit-learn",), **{"scikit-learn": "1.7.0"})
    with pytest.raises(EnvironmentDiffers, match=r"packed under Python 3.13.1, and the base has Python 3.11"):
        wanted(pins(LOCK), packed, BASE)


def test_a_graph_goes_onto_another_python_with_the_servers_own_pins() -> None:
    found = wanted(pins(LOCK), environment("3.13.1", numpy="2.5.5"), BASE)
    assert [pin.version for pin in found.known] == ["2.4.6"]
    assert not found.unknown


def test_the_model_is_the_last_thing_that_is_copied(doubler_bundle: StoredBundle) -> None:
    lines = containerfile("ground:1", BASE.site, labels(doubler_bundle, "3", "0.1.0")).splitlines()
    assert lines[-1] == "COPY bundle/ /bundle/"
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ground:1 AS server", "FROM ground:1"]
    assert "USER 65532:65532" in lines


def test_the_labels_name_digest_owner_purpose_and_version(doubler_bundle: StoredBundle) -> None:
    found = labels(doubler_bundle, "3", "0.1.0")
    assert found["dev.parbake.bundle.digest"] == doubler_bundle.digest
    assert found["org.opencontainers.image.version"] == "3"
    assert found["dev.parbake.owner"] == doubler_bundle.contract.owner
    assert found["dev.parbake.purpose"] == doubler_bundle.contract.purpose


def test_wheels_for_older_systems_run_on_the_base() -> None:
    assert BASE.tags[0] == "manylinux_2_36_x86_64"
    assert {"manylinux_2_28_x86_64", "manylinux2014_x86_64"} <= set(BASE.tags)
    assert "manylinux_2_37_x86_64" not in BASE.tags


@pytest.mark.parametrize("tag", ["eta:1", "registry.example.com:5000/team/eta:v1.2", "eta"])
def test_a_name_of_an_image(tag: str) -> None:
    assert reference(tag) == tag


@pytest.mark.parametrize("tag", ["", "Eta:1", "eta 1", "--rm", "eta\nRUN x", "eta:1 AS x"])
def test_what_is_no_name_of_an_image_is_refused(tag: str) -> None:
    with pytest.raises(SettingsError, match="is no name of an image"):
        reference(tag)
