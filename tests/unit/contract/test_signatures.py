"""Signatures vouch for exactly one digest, and only those of trusted keys count."""

from __future__ import annotations

import builtins
import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parbake.contract.bundle import SIGNATURES, StoredBundle, read_bundle
from parbake.contract.signatures import (
    PublicKey,
    check_signed,
    look_at,
    new_key,
    read_signatures,
    read_trusted,
    sign,
)
from parbake.errors import BundleTorn, BundleUnsigned, Conflict, MissingExtra, SettingsError
from tests.functions import write_scaled

pytestmark = pytest.mark.needs("cryptography")


@pytest.fixture
def ann(tmp_path: Path) -> Path:
    """Ann's private key."""
    new_key(tmp_path / "ann")
    return tmp_path / "ann"


def test_a_pair_is_made_once_and_the_private_key_is_for_its_owner(tmp_path: Path) -> None:
    public = new_key(tmp_path / "ann")
    assert stat.S_IMODE((tmp_path / "ann").stat().st_mode) == 0o600
    assert read_trusted(tmp_path / "ann.pub") == (PublicKey("ann", public.raw),)
    assert len(public.id) == 16
    for path in ("ann", "ann.pub"):
        (tmp_path / "ann").unlink(missing_ok=True)
        (tmp_path / path).touch()
        with pytest.raises(Conflict, match="exists"):
            new_key(tmp_path / "ann")


def test_a_signed_bundle_is_the_same_bundle(tmp_path: Path, ann: Path, doubler_bundle: StoredBundle) -> None:
    sign(doubler_bundle, ann)
    signed = read_bundle(doubler_bundle.path)
    assert signed.digest == doubler_bundle.digest
    found = check_signed(signed, read_trusted(tmp_path / "ann.pub"))
    assert (found.name, found.valid) == ("ann", True)
    # A copy is signed too.
    copy = shutil.copytree(signed.path, tmp_path / "copy.bundle")
    assert check_signed(read_bundle(copy), read_trusted(tmp_path / "ann.pub")) == found


def test_who_signs_again_signs_once_and_others_stay(
    tmp_path: Path, ann: Path, doubler_bundle: StoredBundle
) -> None:
    new_key(tmp_path / "bob")
    for key in (ann, tmp_path / "bob", ann):
        sign(doubler_bundle, key)
    assert len(read_signatures(doubler_bundle)) == 2
    for name in ("ann", "bob"):
        assert check_signed(doubler_bundle, read_trusted(tmp_path / f"{name}.pub")).name == name
    # Nothing is left beside the bundle, or in it.
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_keys_of_openssl_are_keys(tmp_path: Path, doubler_bundle: StoredBundle) -> None:
    key, public = tmp_path / "o.key", tmp_path / "o.pem"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True
    )
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True, capture_output=True
    )
    public.chmod(0o644)
    sign(doubler_bundle, key)
    assert check_signed(doubler_bundle, read_trusted(public)).name == "o"


def _changed(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda one: one.update({field: value(one[field]) if callable(value) else value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed("signed", "2020-01-01T00:00:00+00:00"), "a signature of something else"),
        (
            _changed("signature", lambda text: "A" + text[1:] if text[0] != "A" else "B" + text[1:]),
            "something else",
        ),
        (_changed("signature", ""), "a signature of something else"),
        (_changed("signature", "no base64!"), "a signature of something else"),
        (_changed("public_key", ""), "a signature of something else"),
        (_changed("public_key", "no base64!"), "a signature of something else"),
        (_changed("public_key", "AAAA"), "a signature of something else"),
    ],
)
def test_a_signature_that_was_changed_is_none(
    tmp_path: Path, ann: Path, doubler_bundle: StoredBundle, change: Any, message: str
) -> None:
    sign(doubler_bundle, ann)
    file = doubler_bundle.path / SIGNATURES
    content = json.loads(file.read_text())
    change(content["signatures"][0])
    file.write_text(json.dumps(content))
    with pytest.raises(BundleUnsigned, match=message) as caught:
        check_signed(doubler_bundle, read_trusted(tmp_path / "ann.pub"))
    assert caught.value.hint == f"parbake sign {doubler_bundle.path} --key FILE, by one of: ann"


def test_a_signature_is_of_one_bundle_by_one_key(
    tmp_path: Path, ann: Path, doubler_bundle: StoredBundle
) -> None:
    trusted = read_trusted(tmp_path / "ann.pub")
    with pytest.raises(BundleUnsigned, match="has no signature"):
        check_signed(doubler_bundle, trusted)
    sign(doubler_bundle, ann)
    other = write_scaled(tmp_path / "other.bundle", 3)
    shutil.copy(doubler_bundle.path / SIGNATURES, other.path)
    with pytest.raises(BundleUnsigned, match="has a signature of something else"):
        check_signed(other, trusted)
    stranger = new_key(tmp_path / "stranger")
    sign(other, tmp_path / "stranger")
    with pytest.raises(BundleUnsigned, match=f"is signed by {stranger.id}, whom nobody here trusts"):
        check_signed(other, trusted)
    # What is said of the key counts for nothing: Ann's key with the stranger's signature.
    file = other.path / SIGNATURES
    content = json.loads(file.read_text())
    content["signatures"] = [
        {**one, "public_key": content["signatures"][0]["public_key"]} for one in content["signatures"]
    ]
    file.write_text(json.dumps(content))
    with pytest.raises(BundleUnsigned, match="something else"):
        check_signed(other, trusted)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b'{"signatures": [{"signed": "\xff"}]}',
        b"[]",
        b'{"signatures": [{}]}',
        b'{"signatures": 1}',
        b"[" * 100_000,
        b" " * 2_000_000,
    ],
)
def test_a_torn_file_of_signatures_is_named(doubler_bundle: StoredBundle, content: bytes) -> None:
    (doubler_bundle.path / SIGNATURES).write_bytes(content)
    with pytest.raises(BundleTorn, match=SIGNATURES):
        look_at(doubler_bundle)


def test_signatures_behind_a_link_are_not_read(
    tmp_path: Path, ann: Path, doubler_bundle: StoredBundle
) -> None:
    sign(doubler_bundle, ann)
    file = doubler_bundle.path / SIGNATURES
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleTorn, match="cannot be read"):
        look_at(doubler_bundle)


def test_trusted_keys_are_a_file_or_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "trusted"
    folder.mkdir()
    for name in ("ann", "bob"):
        new_key(tmp_path / name)
        shutil.move(tmp_path / f"{name}.pub", folder)
    (folder / "README").write_text("not a key")
    assert [key.name for key in read_trusted(folder)] == ["ann", "bob"]
    both = tmp_path / "both.pem"
    both.write_bytes((folder / "ann.pub").read_bytes() + b"\n" + (folder / "bob.pub").read_bytes())
    assert {key.raw for key in read_trusted(both)} == {key.raw for key in read_trusted(folder)}


def test_trusted_keys_that_are_not_right_are_refused(tmp_path: Path, ann: Path) -> None:
    folder = tmp_path / "trusted"
    folder.mkdir()
    with pytest.raises(SettingsError, match="no public key in"):
        read_trusted(folder)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_trusted(tmp_path / "nowhere")
    shutil.copy(ann, folder / "private.pem")
    with pytest.raises(SettingsError, match="is no public key"):
        read_trusted(folder)
    rsa = tmp_path / "rsa.pem"
    command: list[str | Path] = [
        "openssl",
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        tmp_path / "k",
    ]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "k", "-pubout", "-out", rsa], check=True, capture_output=True
    )
    with pytest.raises(SettingsError, match="is no Ed25519 key"):
        read_trusted(rsa)
    public = tmp_path / "ann.pub"
    public.chmod(0o666)
    with pytest.raises(SettingsError, match="can be written by others"):
        read_trusted(public)


def test_a_key_that_cannot_sign_is_named(tmp_path: Path, ann: Path, doubler_bundle: StoredBundle) -> None:
    locked = tmp_path / "locked"
    command: list[str | Path] = [
        "openssl",
        "pkey",
        "-in",
        ann,
        "-aes256",
        "-passout",
        "pass:x",
        "-out",
        locked,
    ]
    subprocess.run(command, check=True, capture_output=True)
    for path, message in (
        (tmp_path / "nowhere", "cannot be read"),
        (tmp_path / "ann.pub", "is no private key"),
        (locked, "is encrypted with a password"),
    ):
        with pytest.raises(SettingsError, match=message):
            sign(doubler_bundle, path)
    assert not (doubler_bundle.path / SIGNATURES).exists()


def test_without_the_library_it_is_said_what_to_install(
    tmp_path: Path, ann: Path, doubler_bundle: StoredBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(doubler_bundle, ann)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: new_key(tmp_path / "new"),
        lambda: sign(doubler_bundle, ann),
        lambda: read_trusted(tmp_path / "ann.pub"),
    ):
        with pytest.raises(MissingExtra, match="cryptography is not installed") as caught:
            call()
        assert caught.value.hint == "pip install 'parbake[signing]'"
    # What can be told without it is.
    (found,) = look_at(doubler_bundle)
    assert found.valid is None
