"""The file of API keys: hashes only, for its owner only, changed in one step."""

from __future__ import annotations

import hashlib
import stat
import threading
from pathlib import Path

import pytest

from parbake.app.keys import PREFIX, add_key, hash_of, read_keys, remove_key
from parbake.errors import Conflict, NotFound, SettingsError


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "team-a", ["eta", "double"], 2.5)
    other = add_key(file, "team-b")
    assert key.startswith(PREFIX)
    assert key != other
    assert len(key) == len(PREFIX) + 43  # 256 bits in base64
    assert key not in file.read_text()
    assert key.removeprefix(PREFIX) not in file.read_text()
    first, second = read_keys(file)
    assert (first.name, first.deployments, first.rate_per_s) == ("team-a", ("eta", "double"), 2.5)
    assert (second.name, second.deployments, second.rate_per_s) == ("team-b", (), None)
    assert first.sha256 == hash_of(key) == hashlib.sha256(key.encode()).hexdigest()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_name_has_one_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "team")
    before = file.read_bytes()
    with pytest.raises(Conflict, match="team has a key in"):
        add_key(file, "team")
    assert file.read_bytes() == before


def test_a_key_that_was_removed_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "one")
    add_key(file, "two", ["eta"])
    remove_key(file, "one")
    assert [key.name for key in read_keys(file)] == ["two"]
    with pytest.raises(NotFound, match="'one' has no key") as caught:
        remove_key(file, "one")
    assert caught.value.hint == "keys there: two"
    remove_key(file, "two")
    assert read_keys(file) == ()
    # Nothing is left beside the file.
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "deployments", "rate"),
    [("", (), None), ("a b", (), None), ('x"\nname = "y', (), None), ("a", ("../b",), None), ("a", ("",), None),
     ("a", (), 0.0), ("a", (), -1.0)],
)  # fmt: skip
def test_what_is_no_name_or_rate_is_refused(
    tmp_path: Path, name: str, deployments: tuple[str, ...], rate: float | None
) -> None:
    with pytest.raises(SettingsError):
        add_key(tmp_path / "keys.toml", name, deployments, rate)
    assert list(tmp_path.iterdir()) == []


HASH = "0" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = 1", "Expected `array`"),
        ("[[keys]]\nname = 'a'", "missing required field `sha256`"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{HASH[1:]}'", "matching regex"),
        (f"[[keys]]\nname = 'a/b'\nsha256 = '{HASH}'", "matching regex"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{HASH}'\nscope = 'all'", "unknown field `scope`"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{HASH}'\n" * 2, "the same name twice"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{HASH}'\n[[keys]]\nname = 'b'\nsha256 = '{HASH}'", "same key twice"),
        ("[[keys]", "is not valid TOML"),
        ("\xff", "is not valid TOML"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_right_is_refused_as_a_whole(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_bytes(text.encode("latin-1"))
    file.chmod(0o600)
    with pytest.raises(SettingsError, match=message):
        read_keys(file)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "team")
    for mode, allowed in ((0o600, True), (0o440, True), (0o644, True), (0o620, False), (0o602, False)):
        file.chmod(mode)
        if allowed:
            assert len(read_keys(file)) == 1
            continue
        with pytest.raises(SettingsError, match="can be written by others") as caught:
            read_keys(file)
        assert caught.value.hint == f"chmod 600 {file}"


def test_a_file_or_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"keys\.toml cannot be read") as caught:
        read_keys(tmp_path / "keys.toml")
    assert "parbake keys add" in caught.value.hint
    with pytest.raises(SettingsError, match="no folder"):
        add_key(tmp_path / "nowhere" / "keys.toml", "team")


def test_keys_that_are_added_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    threads = [threading.Thread(target=add_key, args=(file, f"team-{i}")) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(file)} == {f"team-{i}" for i in range(12)}
