"""Settings: read from a file, overridden by flags, and declared so that they can be shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import Struct

from parbake.errors import SettingsError
from parbake.settings import (
    DeploymentSettings,
    ServerSettings,
    Settings,
    declared,
    override,
    read_settings,
)


def test_a_file_is_read_and_its_relative_paths_belong_to_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "parbake.toml"
    file.write_text(
        """
        [server]
        port = 9000
        tls_cert = "cert.pem"
        tls_key = "/etc/key.pem"

        [[deployments]]
        bundle = "eta.bundle"
        table = "eta.table"
        mode = "hybrid"

        [[deployments]]
        bundle = "/models/price.bundle"
        """
    )
    settings = read_settings(file)
    assert settings.server.port == 9000
    assert settings.server.tls_cert == str(tmp_path / "cert.pem")
    assert settings.server.tls_key == "/etc/key.pem"
    eta, price = settings.deployments
    assert (eta.bundle, eta.table, eta.mode) == (
        str(tmp_path / "eta.bundle"), str(tmp_path / "eta.table"), "hybrid",
    )  # fmt: skip
    assert (price.bundle, price.table) == ("/models/price.bundle", "")


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "parbake.toml"
    file.touch()
    assert read_settings(file) == Settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[server]\nprot = 1", "Object contains unknown field `prot` - at `$.server`"),
        ("[server]\nport = 'x'", "Expected `int`, got `str` - at `$.server.port`"),
        ("[server]\nport = 70000", "Expected `int` <= 65535 - at `$.server.port`"),
        ("[server]\ntls_key = 'k.pem'", "tls_key is given without tls_cert - at `$.server`"),
        (
            "[[deployments]]\nmode = 'static'",
            "Object missing required field `bundle` - at `$.deployments[0]`",
        ),
        (
            "[[deployments]]\nbundle = 'b'\nmode = 'fast'",
            "Invalid enum value 'fast' - at `$.deployments[0].mode`",
        ),
        ("[[deployments]]\nbundle = 'b'\nname = '../x'", "at `$.deployments[0].name`"),
        ("deployments = 3", "Expected `array`, got `int` - at `$.deployments`"),
        ("deployments = [3]", "Expected `object`, got `int` - at `$.deployments[0]`"),
        ("server = 3", "Expected `object`, got `int` - at `$.server`"),
        ("[server", "is not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "parbake.toml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        read_settings(file)
    assert str(file) in caught.value.message
    assert message in caught.value.message


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "parbake.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="is not valid TOML"):
        read_settings(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_settings(tmp_path / "parbake.toml")


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    before = ServerSettings(port=1, workers=2)
    assert override(before, {"port": 3}) == ServerSettings(port=3, workers=2)
    assert override(before, {}) is before


def test_an_override_is_checked_like_the_file() -> None:
    with pytest.raises(SettingsError, match=r"Expected `float` > 0.*deadline_ms"):
        override(DeploymentSettings(bundle="b"), {"deadline_ms": 0.0})


@pytest.mark.parametrize("kind", [ServerSettings, DeploymentSettings])
def test_every_default_lies_within_the_bounds_that_are_shown(kind: type[Struct]) -> None:
    for setting in declared(kind):
        if setting.default is None or setting.minimum is None:
            continue
        assert (
            setting.default > setting.minimum if setting.minimum_open else setting.default >= setting.minimum
        )
        assert setting.maximum is None or setting.default <= setting.maximum


def test_flag_variable_and_key_are_one_name() -> None:
    by_field = {setting.field: setting for setting in declared(ServerSettings)}
    assert set(by_field) == set(ServerSettings.__struct_fields__)
    grpc_port = by_field["grpc_port"]
    assert (grpc_port.flag, grpc_port.variable) == ("--grpc-port", "PARBAKE_GRPC_PORT")
    assert (grpc_port.kind, grpc_port.default, grpc_port.minimum, grpc_port.maximum) == (int, None, 0, 65535)


def test_no_two_settings_share_a_flag() -> None:
    flags = [
        setting.flag
        for kind in (ServerSettings, DeploymentSettings)
        for setting in declared(kind)
        if setting.option is not None
    ]
    assert len(flags) == len(set(flags))


def test_the_store_of_a_file_belongs_to_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "parbake.toml"
    for given, meant in (
        ("sqlite:///releases.db", f"sqlite:///{tmp_path}/releases.db"),
        ("sqlite:////var/lib/releases.db", "sqlite:////var/lib/releases.db"),
        ("postgresql://ana@db/parbake", "postgresql://ana@db/parbake"),
    ):
        file.write_text(f'[server]\nstate_dir = "kept"\n[release]\nstore = "{given}"\n')
        settings = read_settings(file)
        assert settings.release.store == meant
        assert settings.server.state_dir == str(tmp_path / "kept")
    file.write_text("[release]\nstore = 5\n")
    with pytest.raises(SettingsError, match=r"Expected `str`, got `int` - at `\$.release.store`"):
        read_settings(file)
