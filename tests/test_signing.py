"""Signed heads: only what the key's holder signed is believed, and a chain that lost its end is found by them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from gradatim.app.signing import make_key, signed, verified
from gradatim.errors import ConfigError
from gradatim.release.traffic import promote
from gradatim.store import open_store
from gradatim.types import AdapterId

from .records import adapter
from .test_cli import run

FACTS = {"head": "9f86d081", "decisions": 3}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "k")
    return tmp_path / "k"


def kept(key: Path, document: object) -> Path:
    at = key.with_name("head.json")
    at.write_text(document if isinstance(document, str) else json.dumps(document))
    return at


def pub(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


def test_what_was_signed_is_read_back(key: Path) -> None:
    assert verified(kept(key, signed(FACTS, key)), pub(key)) == FACTS
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize("change", [{"head": "0"}, {"decisions": 4}, {"more": 1}, {"signature": "AAAA"}])
def test_what_was_changed_is_refused(key: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="was changed since"):
        verified(kept(key, signed(FACTS, key) | change), pub(key))


def test_another_ones_key_is_refused(key: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    with pytest.raises(ConfigError, match="was not signed with the key"):
        verified(kept(key, signed(FACTS, tmp_path / "other")), pub(key))


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"signature": "%"}', '{"signature": 3}'])
def test_what_is_no_signed_head_is_refused(key: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="is no signed head"):
        verified(kept(key, content), pub(key))


def test_a_key_is_never_overwritten_and_must_be_one(key: Path, tmp_path: Path) -> None:
    before = key.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        make_key(key)
    assert key.read_bytes() == before
    with pytest.raises(ConfigError, match="no private key"):
        signed(FACTS, pub(key))
    with pytest.raises(ConfigError, match="no public key"):
        verified(kept(key, signed(FACTS, key)), key)
    curve = tmp_path / "curve"
    private = serialization.PrivateFormat.PKCS8
    curve.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            serialization.Encoding.PEM, private, serialization.NoEncryption()
        )
    )
    with pytest.raises(ConfigError, match="no Ed25519 key"):
        signed(FACTS, curve)
    with pytest.raises(ConfigError, match="cannot read"):
        signed(FACTS, tmp_path / "none")


def test_a_chain_that_lost_its_end_is_found_by_a_signed_head(key: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with open_store(data / "gradatim.db") as store:
        store.append(adapter(0), adapter(1, parent=0))
        promote(store, "agent", AdapterId("agent@1"), actor="person")
    code, out = run("audit", "sign", str(key), "--data-dir", str(data))
    assert code == 0
    head = kept(key, out)
    check = ("audit", "verify", "--signed", str(head), "--public", str(pub(key)), "--data-dir", str(data))
    assert run(*check)[0] == 0
    with open_store(data / "gradatim.db") as store, store.engines.write.begin() as connection:
        for table in ("moves", "audit"):
            newest = f"(SELECT log_position FROM {table} ORDER BY log_position DESC LIMIT 1)"
            connection.exec_driver_sql(f"DELETE FROM {table} WHERE log_position = {newest}")
    assert run("audit", "verify", "--data-dir", str(data))[0] == 0  # the chain by itself does not tell
    code, out = run(*check)
    assert code == 1
    assert "cut off" in out


def test_options_that_do_not_go_together_are_told(key: Path, tmp_path: Path) -> None:
    code, said = run("audit", "verify", "--signed", "x", "--data-dir", str(tmp_path))
    assert code == 1
    assert "--public" in said
